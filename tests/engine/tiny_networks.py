"""Small networks for the engine's tests: random ones, and one that generates a script."""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import nn

from vicugna import models, tokenizer
from vicugna.checkpoint.state_dict import ties
from vicugna.engine import weights
from vicugna.engine.cpu.formats import FORMATS
from vicugna.models.layers.attention import Dense

VOCABULARY = 61


@lru_cache(maxsize=32)
def random_network(kind="vicugna", **changes):
    """A network with weights large enough that every step has a clear winner."""
    config = {"model_type": kind, "vocab_size": VOCABULARY, "hidden_size": 32,
              "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
              "sliding_window": 5, "tie_word_embeddings": False, **changes}
    network = models.build(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "log_scale" in name:
                parameter.copy_(1 + 0.1 * drawn)
            else:
                parameter.copy_(drawn * (0.3 if "conv" in name else parameter.shape[-1] ** -0.5))
    return network


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def plain_logits(network, tokens):
    """Logits [T, V] of one sequence, without a cache."""
    positions = torch.arange(len(tokens))[None]
    return network.lm_head(network(torch.tensor([tokens]), positions, Dense()))[0]


def finish(engine):
    """Step until nothing runs: {id: (tokens, logprobs, finish reason)}."""
    found = {}
    while engine.busy:
        for output in engine.step():
            tokens, logprobs, _ = found.get(output.id, ([], [], None))
            found[output.id] = (tokens + output.tokens, logprobs + output.logprobs,
                                output.finish_reason)
    return found


def pack_network(network, kind):
    """Pack every matrix whose rows fill the blocks of `kind`, in place; returns the network."""
    from vicugna.engine.cpu.linear import pack
    from vicugna.engine.packed import put

    tied = ties(network)
    for name, module in weights.matrices(network).items():
        if name in tied:
            continue
        weight = network.get_parameter(name).detach()
        weight = weight.mT.contiguous() if getattr(module, "transposed", False) else weight
        if weight.shape[-1] % FORMATS[kind].columns == 0:
            made = [pack(one, kind) for one in (weight if weight.dim() == 3 else [weight])]
            put(network, name, made, weight.dtype, tied)
    return network


class Scripted(nn.Module):
    """After a prompt of `start` tokens it generates `script`, then its last token for ever."""

    def __init__(self, script, start, vocab_size, context=4096):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=context)
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.script, self.start = torch.tensor(script), start
        self.batches = []  # the number of tokens of every call

    def forward(self, tokens_BT, positions_BT, attend):
        self.batches.append(tokens_BT.shape[1])
        step = (positions_BT - self.start + 1).clamp(0, len(self.script) - 1)
        return 50 * nn.functional.one_hot(self.script[step], self.config.vocab_size).float()


@lru_cache(maxsize=1)
def small_tokenizer():
    """Bytes, and a few merges over the letters of the tests' texts."""
    text = "abc abcab cab bca aab é🙂 ab🙂 caé " * 20
    return tokenizer.train([text], tokenizer.MINIMUM_VOCABULARY + 8)

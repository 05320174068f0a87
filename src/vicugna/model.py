"""The Python face: load a model, ask it for logits or text, save it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import checkpoint, engine
from vicugna.engine import Delta, Sampling
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense
from vicugna.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Generation:
    """What a model said: `text` as it came, with any reasoning inside <think>.

    `reasoning` is what stands between the marks, None without them. `tokens` and `logprobs`
    (natural logarithms under the model's own distribution) go together. `finish_reason` is "stop"
    or "length"; `usage` counts prompt_tokens, completion_tokens and total_tokens.
    """

    text: str
    reasoning: str | None
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    usage: dict[str, int]


def load(path: str | Path, dtype: str = "float32", device: str = "cpu") -> Model:
    """Load the checkpoint in folder `path`, or of Hub id `org/name[@revision]`.

    `dtype` is "float32", "bfloat16", or "auto" for what is stored. Raises VicugnaError.
    """
    if dtype not in DTYPES:
        raise VicugnaError(f"unknown dtype {dtype!r}", "load", f"Use one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VicugnaError(f"device {device!r} is not usable here", "load",
                           "Use 'cpu', or install a PyTorch that knows it") from error
    read = checkpoint.read(path, DTYPES[dtype], device)
    return Model(read.network, read.tokenizer, read.generation_config)


class Model:
    """A network and its tokenizer. A model without a tokenizer has logits, but no text."""

    def __init__(self, network: nn.Module, tokenizer: Tokenizer | None = None,
                 generation_config: dict[str, Any] | None = None) -> None:
        self.network, self.tokenizer = network, tokenizer
        if generation_config is None:
            generation_config = checkpoint.default_generation_config(tokenizer) if tokenizer else {}
        self.generation_config = generation_config
        self._digest: tuple[Any, str] | None = None

    @property
    def config(self) -> Any:
        """The network's frozen Config; its fields are the keys of config.json."""
        return self.network.config

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is loaded; see checkpoint/digest.py.

        Computed on first use, and again once something was replaced or a weight was trained.
        """
        state = self.network.state_dict()
        seen = ([(tensor.data_ptr(), tensor._version) for tensor in state.values()],
                self.tokenizer, dict(self.generation_config))
        if self._digest is None or self._digest[0] != seen:
            self._digest = seen, checkpoint.digest(state, checkpoint.network_config(self.network),
                                                   self.tokenizer, self.generation_config)
        return self._digest[1]

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits after every token, float32 [B, T, V], from one forward pass without a cache.

        Raises VicugnaError unless the tokens are a rectangle [B, T] of ids in the vocabulary.
        """
        try:
            tokens = torch.as_tensor(tokens_BT)
        except (TypeError, ValueError, RuntimeError) as error:
            raise VicugnaError(f"not a rectangle of token ids: {error}", "logits",
                               "Give rows of the same length") from error
        if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
            raise VicugnaError(f"not token ids of shape [B, T], but {tokens.dtype} of shape "
                               f"{list(tokens.shape)}", "logits", "Give one row for each sequence")
        V = self.config.vocab_size
        if outside := tokens[(tokens < 0) | (tokens >= V)].tolist():
            raise VicugnaError(f"token id {outside[0]} is outside the vocabulary of {V}", "logits",
                               "Use this model's tokenizer")
        network: Any = self.network
        tokens = tokens.to(network.lm_head.weight.device, torch.long)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return network.lm_head(network(tokens, positions, Dense())).float()

    def generate(self, prompt: Prompt, max_new_tokens: int = 64, temperature: float = 0.0,
                 seed: int = 0, **more: Any) -> Generation:
        """Continue a text, or answer a list of {"role", "content"} messages.

        A text is continued as it stands (after the beginning-of-text token); messages go through
        the chat template. Temperature 0 takes the likeliest token. `more`: top_k, top_p, min_p and
        stop, as in engine.Sampling. Raises VicugnaError without a tokenizer, for a setting that
        is impossible or unknown, and for a prompt longer than the context.
        """
        tokenizer, tokens, sampling = self._ask(prompt, max_new_tokens, temperature, seed, more)
        done = engine.generate(self.network, tokenizer, [tokens], sampling)[0]
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(done.tokens),
                 "total_tokens": len(tokens) + len(done.tokens)}
        return Generation(done.text, tokenizer.split_reasoning(done.tokens)[0], done.tokens,
                          done.logprobs, done.finish_reason, usage)

    def stream(self, prompt: Prompt, max_new_tokens: int = 64, temperature: float = 0.0,
               seed: int = 0, **more: Any) -> Iterator[Delta]:
        """As `generate`, token by token; the last delta has a finish_reason. Errors come now."""
        tokenizer, tokens, sampling = self._ask(prompt, max_new_tokens, temperature, seed, more)
        return engine.stream(self.network, tokenizer, tokens, sampling)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face directory, whole or not at all; loading it gives this digest."""
        checkpoint.write(folder, self.network, self.tokenizer, self.generation_config)

    def _ask(self, prompt: Prompt, max_new_tokens: int, temperature: float, seed: int,
             more: dict[str, Any]) -> tuple[Tokenizer, list[int], Sampling]:
        if self.tokenizer is None:
            raise VicugnaError("this model has no tokenizer: there is no tokenizer.json", "text",
                               "Add its tokenizer files to the folder, or use logits()")
        try:
            sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                                **more)
        except TypeError as error:  # a name that Sampling does not have, or a value's type
            known = ", ".join(field.name for field in fields(Sampling))
            raise VicugnaError(str(error), "sampling", f"The settings are {known}") from error
        if not isinstance(prompt, str):
            return self.tokenizer, self.tokenizer.chat(prompt), sampling
        return self.tokenizer, [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], sampling

"""A tiny random model of transformers, the same weights in ours, and what must agree.

`theirs, ours = pair(config)` makes both; each `agree_*` function asserts one thing about them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from paged import PagedRows
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import vicugna
from vicugna.models.layers.attention import Dense

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "initializer_range": 0.1}
YARN = {"max_position_embeddings": 256, "rope_parameters": {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}}
LOGITS = 1e-5  # greatest difference of float32 logits


def reference(config, seed=0, make=AutoModelForCausalLM):
    """transformers' model of `config` with random weights, norms and biases; evaluating."""
    torch.manual_seed(seed)
    model = make.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "bias" in name:
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def converted(model):
    """Our network with the weights of transformers' model, through the files that it writes."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return vicugna.load(folder).network


def pair(config, seed=0, make=AutoModelForCausalLM):
    """The same random model twice: transformers' and ours."""
    theirs = reference(config, seed, make)
    return theirs, converted(theirs)


def random_tokens(B, T, vocabulary=97, seed=1) -> Tensor:
    """Token ids [B, T]."""
    return torch.randint(0, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(network, tokens_BT, positions_BT=None, attend=None) -> Tensor:
    """Our logits [B, T, V], uncached if no `attend` is given."""
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    return network.lm_head(network(tokens_BT, positions_BT, attend or Dense()))


def in_parts(network, tokens_BT, positions_BT, parts, pads, images=None) -> Tensor:
    """Our logits [B, T, V] from calls of `parts` columns each over the engine's pages, zero at the
    `pads` columns at the start of each row. `images(tokens)` are further arguments of a call."""
    B, T = tokens_BT.shape
    rows, out = PagedRows(network, B, T), tokens_BT.new_zeros(B, T, network.config.vocab_size,
                                                              dtype=torch.float32)
    end = 0
    for part in parts:
        begin, end = end, end + part
        here = [slice(min(max(begin, pad), end), end) for pad in pads]
        got = rows.logits([row[own] for row, own in zip(tokens_BT, here, strict=True)],
                          [row[own] for row, own in zip(positions_BT, here, strict=True)],
                          **(images(tokens_BT[:, begin:end]) if images else {}))
        for row, own, logits in zip(out, here, got, strict=True):
            row[own] = logits
    return out


def near(got, due, tolerance=LOGITS):
    assert got.shape == due.shape
    worst = (got - due).abs().max().item()
    assert worst < tolerance, f"differs by {worst:.2e}"  # also when it is NaN


def agree(theirs, ours, tokens_BT):
    """Logits of 3 rows of 40 tokens or more: uncached, cached, and padded on the left."""
    rest = tokens_BT.shape[1] - 15
    agree_uncached(theirs, ours, tokens_BT)
    agree_cached(theirs, ours, tokens_BT, [1, 6, 7, 1, rest])
    agree_padded(theirs, ours, tokens_BT, [0, 5, 33])
    agree_padded(theirs, ours, tokens_BT, [9, 0, 2], [11, 1, 1, rest + 2])


def agree_uncached(theirs, ours, tokens_BT, first=0):
    """Logits at every position of whole rows, whose first position is `first`."""
    positions_BT = torch.arange(first, first + tokens_BT.shape[1]).expand(tokens_BT.shape)
    with torch.no_grad():
        due = theirs(tokens_BT, position_ids=positions_BT).logits
    assert due.std() > 0.1  # logits of order one: else the tolerance would say little
    near(logits_of(ours, tokens_BT, positions_BT), due)


def agree_cached(theirs, ours, tokens_BT, parts, first=0):
    """Logits of calls of `parts` tokens each, over a cache, equal those of whole rows."""
    positions_BT = torch.arange(first, first + tokens_BT.shape[1]).expand(tokens_BT.shape)
    with torch.no_grad():
        due = theirs(tokens_BT, position_ids=positions_BT).logits
    near(in_parts(ours, tokens_BT, positions_BT, parts, [0] * len(tokens_BT)), due)


def agree_padded(theirs, ours, tokens_BT, pads, parts=None):
    """Logits at the real positions of left-padded rows; `parts` as for `agree_cached`."""
    mask_BT = torch.arange(tokens_BT.shape[1]) >= torch.tensor(pads)[:, None]
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        due = theirs(tokens_BT, attention_mask=mask_BT.long(), position_ids=positions_BT).logits
    got = in_parts(ours, tokens_BT, positions_BT, parts or [tokens_BT.shape[1]], pads)
    near(got[mask_BT], due[mask_BT])


def agree_gradients(theirs, ours, tokens_BT):
    """Gradients of the next-token loss, for every parameter of ours; `theirs` is of no use then."""
    theirs(tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
    positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    logits = ours.lm_head(ours(tokens_BT, positions_BT, Dense()))
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    with torch.no_grad():  # a gradient takes the way of its weights through the files
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    due = dict(converted(theirs).named_parameters())
    for name, parameter in ours.named_parameters():
        got = torch.zeros(()) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got.expand_as(parameter), due[name], atol=1e-5, rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")


def agree_round_trip(theirs, folder: Path, make=AutoModelForCausalLM):
    """transformers -> Vicugna -> transformers: the same files' tensors, weights and config."""
    theirs.save_pretrained(folder / "theirs")
    vicugna.load(folder / "theirs", dtype="auto").save(folder / "ours")
    first, second = (tensors_of(folder / name) for name in ("theirs", "ours"))
    again = make.from_pretrained(folder / "ours", dtype="auto")
    for one, other in ((first, second), (theirs.state_dict(), again.state_dict())):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    ignored = {"architectures", "transformers_version", "_name_or_path"}
    before = make.from_pretrained(folder / "theirs", dtype="auto")  # loading notes dtypes too
    first, second = ({key: value for key, value in model.config.to_dict().items()
                      if key not in ignored} for model in (before, again))
    assert first == second


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found

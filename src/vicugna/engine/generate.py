"""Continuing prompts: many at once (`generate`), or one as it comes (`stream`)."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vicugna.engine.cache import Cache
from vicugna.engine.sampling import Sampler, Sampling, TopLogprobs
from vicugna.errors import VicugnaError
from vicugna.tokenizer import StreamDecoder, Tokenizer

_CHUNK = 2048  # columns of the prompts read in one call of the network, at most
_CHUNK_TOKENS = 8192  # and tokens over all rows: bounds the memory of activations
_TILES = 32  # of images, seen in one call
Cancelled = Callable[[], bool] | None


@dataclass
class Completion:
    """What followed one prompt: `tokens` with the end-of-turn token, `text` without it and without
    a stop string; `logprobs` are float32, under the network's own distribution. `finish_reason` is
    "stop" (end token or stop string), "length" (max_new_tokens or the context) or "cancelled"."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str = "length"
    text: str = ""
    prompt_tokens: int = 0


@dataclass
class Delta:
    """One step of a completion; texts joined are `Completion.text`. The last has a reason."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str | None


def generate(network: nn.Module, tokenizer: Tokenizer | None, prompts: list[list[int]],
             sampling: Sampling | list[Sampling], cancelled: Cancelled = None,
             images: list[Tensor | None] | None = None) -> list[Completion]:
    """Continue every prompt, all in one batch, on the device of the network's weights.

    `images` are the tiles [N, 3, H, W] of each prompt's images, or None for a prompt without any.
    Equal prompts, with the very same images, are read once. With one `sampling` for all, copies of
    a prompt get streams of their own (seed and number of the copy); with a list, a row's stream is
    its seed's alone.
    Without a tokenizer there are no end tokens, no stop strings and no text. Memory is `Cache`'s,
    all rows padded to the longest: a caller with many uneven prompts sorts and splits them.
    Raises VicugnaError for an empty prompt, one longer than the context, tokens outside the
    vocabulary, image tokens that do not fit the images, stop strings without a tokenizer, and
    weights that give NaN.
    """
    completions = [Completion(prompt_tokens=len(prompt)) for prompt in prompts]
    rows = _rows(network, tokenizer, prompts, sampling, images)
    for number, delta in _steps(network, rows, cancelled):
        completion = completions[number]
        completion.tokens += delta.tokens
        completion.logprobs += delta.logprobs
        completion.top_logprobs += delta.top_logprobs
        completion.finish_reason = delta.finish_reason or completion.finish_reason
        completion.text += delta.text
    return completions


def stream(network: nn.Module, tokenizer: Tokenizer | None, prompt: list[int], sampling: Sampling,
           cancelled: Cancelled = None, images: Tensor | None = None
           ) -> Generator[Delta, None, None]:
    """Continue one prompt, a `Delta` a token; the same completion as `generate`'s.

    A text never holds half a character, nor the beginning of what may become a stop string: such
    text comes with a later delta. Raises as `generate` does, at the call.
    """
    steps = _steps(network, _rows(network, tokenizer, [prompt], sampling, [images]), cancelled)
    return (delta for _, delta in steps)


class _Row:
    """One prompt on its way; its text is cut before the first stop string."""

    def __init__(self, number: int, prompt: tuple[int, ...], images: Tensor | None,
                 sampling: Sampling, context: int, tokenizer: Tokenizer | None) -> None:
        self.number, self.prompt, self.images, self.sampling = number, prompt, images, sampling
        self.read = prompt, id(images)  # rows in which this is equal are read once
        self.copy = 0  # its number among those
        self.room = min(sampling.max_new_tokens, context - len(prompt))  # tokens still to choose
        self.eos_ids = tokenizer.eos_ids if tokenizer else ()
        self.decoder = StreamDecoder(tokenizer) if tokenizer else None
        self.held = ""  # text that may become a stop string
        self.done = False

    def push(self, token: int, logprob: float, top: TopLogprobs) -> Delta:
        """Take a chosen token."""
        self.room -= 1
        reason = "stop" if token in self.eos_ids else "length" if self.room == 0 else None
        text = ""
        if self.decoder and token not in self.eos_ids:
            text, stops = self.held + self.decoder.push(token), self.sampling.stop
            # The stop string that is complete first, as if characters came one by one.
            if found := [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]:
                reason, text, self.held = "stop", text[: min(found)[1]], ""
                self.decoder.finish()  # forget a character that the last token began
            else:
                certain = len(text) - max((n for stop in stops for n in range(1, len(stop))
                                           if text.endswith(stop[:n])), default=0)
                text, self.held = text[:certain], text[certain:]
        if reason:
            text += self.end(reason).text
        return Delta(text, [token], [logprob], [top] if top else [], reason)

    def end(self, reason: str) -> Delta:
        """Finish without another token."""
        self.done = True
        text = self.held + self.decoder.finish() if self.decoder else ""
        return Delta(text, [], [], [], reason)


def _rows(network: nn.Module, tokenizer: Tokenizer | None, prompts: list[list[int]],
          sampling: Sampling | list[Sampling], images: list[Tensor | None] | None) -> list[_Row]:
    """Check the prompts and make a row of each."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    seen = [None] * len(prompts) if images is None else images
    for name, given in (("samplings", len(samplings)), ("lists of images", len(seen))):
        if given != len(prompts):
            raise VicugnaError(f"{len(prompts)} prompts but {given} {name}", "generate",
                               "Give one for all, or one for each")
    config: Any = network.config
    context, V = config.context_length, config.vocab_size
    copies, rows = Counter[Any](), list[_Row]()
    for number, (prompt, tiles, chosen) in enumerate(
            zip(map(tuple, prompts), seen, samplings, strict=True)):
        where = f"prompt {number + 1}"
        if not prompt:
            raise VicugnaError("the prompt is empty", where, "Give at least one token")
        if len(prompt) > context:
            raise VicugnaError(f"{len(prompt)} tokens, but the context holds {context}", where,
                               "Shorten it, or use a model with a longer context")
        if min(prompt) < 0 or max(prompt) >= V:
            raise VicugnaError(f"tokens reach from {min(prompt)} to {max(prompt)}, but the "
                               f"vocabulary has {V}", where, "Use the model's own tokenizer")
        if chosen.stop and tokenizer is None:
            raise VicugnaError("stop strings need a tokenizer", "sampling", "Give one")
        if any(one is not None for one in seen):
            _check_images(config, prompt, tiles, where)
        row = _Row(number, prompt, tiles, chosen, context, tokenizer)
        row.copy = copies[row.read] if samplings is not sampling else 0
        rows.append(row)
        copies[row.read] += 1
    return rows


def _check_images(config: Any, prompt: tuple[int, ...], tiles: Tensor | None, where: str) -> None:
    """Raise VicugnaError unless a network sees, and the prompt's image tokens are its tiles'."""
    if (eyes := getattr(config, "vision_config", None)) is None:
        raise VicugnaError("this model has no vision encoder", where, "Leave images out")
    due, count = 0 if tiles is None else len(tiles), prompt.count(config.image_token_index)
    if count != due * eyes.features:
        raise VicugnaError(f"{count} image tokens, but {due} tiles make {due * eyes.features} "
                           "features", where, f"Write token {config.image_token_index} once for "
                           "each feature of a tile")


@torch.inference_mode()
def _steps(network: nn.Module, rows: list[_Row], cancelled: Cancelled
           ) -> Iterator[tuple[int, Delta]]:
    """The one loop of generation: what each unfinished row gained, step by step."""
    yield from [(row.number, row.end("length")) for row in rows if row.room == 0]
    if not (rows := [row for row in rows if row.room > 0]):
        return
    head: Any = network.lm_head
    device = next(network.parameters()).device
    cache, hidden_BD = _prefill(network, rows, device, cancelled)
    sampler = Sampler([row.sampling for row in rows], [row.copy for row in rows], device)
    positions_B1 = torch.tensor([[len(row.prompt)] for row in rows], device=device)
    while hidden_BD is not None:
        tokens, logprobs, tops = sampler.choose(head(hidden_BD))
        yield from [(row.number, row.push(token, logprob, top)) for row, token, logprob, top
                    in zip(rows, tokens, logprobs, tops, strict=True) if not row.done]
        if not (alive := [b for b, row in enumerate(rows) if not row.done]):
            return
        if cancelled and cancelled():
            break
        if 8 * len(alive) <= 7 * len(rows):  # seldom enough for the copies not to matter
            rows, tokens = [rows[b] for b in alive], [tokens[b] for b in alive]
            positions_B1 = positions_B1[alive]
            cache.keep(alive)
            sampler.keep(alive)
        tokens_B1 = positions_B1.new_tensor(tokens)[:, None]
        hidden_BD = network(tokens_B1, positions_B1, cache)[:, -1]
        positions_B1 += 1
    yield from [(row.number, row.end("cancelled")) for row in rows if not row.done]


def _prefill(network: Any, rows: list[_Row], device: torch.device, cancelled: Cancelled
             ) -> tuple[Cache, Tensor | None]:
    """The cache, and the last hidden states [B, D], None if cancelled; equal prompts read once."""
    first = {row.read: row for row in rows}
    distinct, place = list(first.values()), {read: b for b, read in enumerate(first)}
    tokens_BT = pad_sequence([torch.tensor(row.prompt) for row in distinct], batch_first=True,
                             padding_side="left").to(device)
    longest = tokens_BT.shape[1]
    pads = [longest - len(row.prompt) for row in distinct]
    positions_BT = (torch.arange(longest) - torch.tensor(pads)[:, None]).clamp(min=0).to(device)
    images = [tiles for row in distinct if row.images is not None
              for tiles in row.images.split(_TILES)]
    if images:  # seen once, whatever the chunks; each of these gets the features of its own tokens
        features_MD = torch.cat([network.encode_images(tiles.to(device)) for tiles in images])
        stands_BT = tokens_BT == network.config.image_token_index
        number_BT = stands_BT.flatten().cumsum(0).view_as(stands_BT) - 1
    cache = Cache(pads, device)
    chunk = max(16, min(_CHUNK, _CHUNK_TOKENS // len(distinct)))
    for start in range(0, longest, chunk):
        if cancelled and cancelled():
            return cache, None
        here, seen = slice(start, start + chunk), {}
        if images:
            seen["features_MD"] = features_MD[number_BT[:, here][stands_BT[:, here]]]
        hidden_BTD = network(tokens_BT[:, here], positions_BT[:, here], cache, **seen)
    chosen = [place[row.read] for row in rows]
    if len(distinct) < len(rows):
        cache.keep(chosen)
    return cache, hidden_BTD[chosen, -1]

"""Generation: a batch of prompts (`generate`), or one as a stream (`stream`)."""

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

_CHUNK = 2048  # columns of the prompts in one prefill call, at most
_CHUNK_TOKENS = 8192  # and tokens over all rows: bounds the memory of activations
_TILES = 32  # of images, encoded in one call
Cancelled = Callable[[], bool] | None


@dataclass
class Completion:
    """The completion of one prompt: `tokens` with the end-of-turn token, `text` without it and
    without a stop string; `logprobs` are float32, under the network's own distribution.
    `finish_reason` is "stop" (end token or stop string), "length" (max_new_tokens or the context)
    or "cancelled"."""

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
    Equal prompts, with the very same images, are prefilled once. With one `sampling` for all,
    copies of a prompt get random streams of their own (seed and number of the copy); with a list,
    a row's stream is its seed's alone.
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


class _Sequence:
    """One prompt and its completion so far; the text is cut before the first stop string."""

    def __init__(self, number: int, prompt: tuple[int, ...], images: Tensor | None,
                 sampling: Sampling, context: int, tokenizer: Tokenizer | None) -> None:
        self.number, self.prompt, self.images, self.sampling = number, prompt, images, sampling
        self.prefix = prompt, id(images)  # sequences in which this is equal are prefilled once
        self.copy = 0  # its number among those
        self.remaining = min(sampling.max_new_tokens, context - len(prompt))  # tokens to generate
        self.eos_ids = tokenizer.eos_ids if tokenizer else ()
        self.decoder = StreamDecoder(tokenizer) if tokenizer else None
        self.pending = ""  # text that may become a stop string
        self.finished = False

    def push(self, token: int, logprob: float, top: TopLogprobs) -> Delta:
        """Append a sampled token."""
        self.remaining -= 1
        reason = "stop" if token in self.eos_ids else "length" if self.remaining == 0 else None
        text = ""
        if self.decoder and token not in self.eos_ids:
            text, stops = self.pending + self.decoder.push(token), self.sampling.stop
            # The stop string that is complete first, as if characters came one by one.
            if found := [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]:
                reason, text, self.pending = "stop", text[: min(found)[1]], ""
                self.decoder.finish()  # drop a character that the last token began
            else:
                certain = len(text) - max((n for stop in stops for n in range(1, len(stop))
                                           if text.endswith(stop[:n])), default=0)
                text, self.pending = text[:certain], text[certain:]
        if reason:
            text += self.end(reason).text
        return Delta(text, [token], [logprob], [top] if top else [], reason)

    def end(self, reason: str) -> Delta:
        """Finish without another token."""
        self.finished = True
        text = self.pending + self.decoder.finish() if self.decoder else ""
        return Delta(text, [], [], [], reason)


def _rows(network: nn.Module, tokenizer: Tokenizer | None, prompts: list[list[int]],
          sampling: Sampling | list[Sampling], images: list[Tensor | None] | None
          ) -> list[_Sequence]:
    """Check the prompts and make a sequence of each."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    tiles_of = [None] * len(prompts) if images is None else images
    for name, given in (("samplings", len(samplings)), ("lists of images", len(tiles_of))):
        if given != len(prompts):
            raise VicugnaError(f"{len(prompts)} prompts but {given} {name}", "generate",
                               "Pass one for all, or one for each prompt")
    config: Any = network.config
    context, V = config.context_length, config.vocab_size
    with_images = any(tiles is not None for tiles in tiles_of)
    copies, rows = Counter[Any](), list[_Sequence]()
    for number, (prompt, tiles, chosen) in enumerate(
            zip(map(tuple, prompts), tiles_of, samplings, strict=True)):
        where = f"prompt {number + 1}"
        if not prompt:
            raise VicugnaError("the prompt is empty", where, "It needs at least one token")
        if len(prompt) > context:
            raise VicugnaError(f"{len(prompt)} tokens, but the context holds {context}", where,
                               "Shorten it, or use a model with a longer context")
        if min(prompt) < 0 or max(prompt) >= V:
            raise VicugnaError(f"token ids from {min(prompt)} to {max(prompt)}, but the "
                               f"vocabulary has {V}", where, "Use the model's own tokenizer")
        if chosen.stop and tokenizer is None:
            raise VicugnaError("stop strings need a tokenizer", "sampling",
                               "Pass a tokenizer, or no stop strings")
        if with_images:
            _check_images(config, prompt, tiles, where)
        row = _Sequence(number, prompt, tiles, chosen, context, tokenizer)
        row.copy = copies[row.prefix] if samplings is not sampling else 0
        rows.append(row)
        copies[row.prefix] += 1
    return rows


def _check_images(config: Any, prompt: tuple[int, ...], tiles: Tensor | None, where: str) -> None:
    """Raise VicugnaError unless there is a vision encoder, and an image token for each feature."""
    if (vision := getattr(config, "vision_config", None)) is None:
        raise VicugnaError("this is a text-only model: it has no vision encoder", where,
                           "Leave images out")
    given, count = 0 if tiles is None else len(tiles), prompt.count(config.image_token_index)
    if count != given * vision.features:
        raise VicugnaError(f"{count} image tokens, but {given} tiles make "
                           f"{given * vision.features} features", where,
                           f"The prompt needs token {config.image_token_index} once for each")


@torch.inference_mode()
def _steps(network: nn.Module, rows: list[_Sequence], cancelled: Cancelled
           ) -> Iterator[tuple[int, Delta]]:
    """The generation loop: prefill, then decode step by step; yields what each sequence gained."""
    yield from [(row.number, row.end("length")) for row in rows if row.remaining == 0]
    if not (rows := [row for row in rows if row.remaining > 0]):
        return
    head: Any = network.lm_head
    device = next(network.parameters()).device
    cache, hidden_BD = _prefill(network, rows, device, cancelled)
    sampler = Sampler([row.sampling for row in rows], [row.copy for row in rows], device)
    positions_B1 = torch.tensor([[len(row.prompt)] for row in rows], device=device)
    while hidden_BD is not None:
        tokens, logprobs, tops = sampler.choose(head(hidden_BD))
        yield from [(row.number, row.push(token, logprob, top)) for row, token, logprob, top
                    in zip(rows, tokens, logprobs, tops, strict=True) if not row.finished]
        if not (unfinished := [b for b, row in enumerate(rows) if not row.finished]):
            return
        if cancelled and cancelled():
            break
        if 8 * len(unfinished) <= 7 * len(rows):  # seldom enough for the copies not to matter
            rows, tokens = [rows[b] for b in unfinished], [tokens[b] for b in unfinished]
            positions_B1 = positions_B1[unfinished]
            cache.select(unfinished)
            sampler.select(unfinished)
        tokens_B1 = positions_B1.new_tensor(tokens)[:, None]
        hidden_BD = network(tokens_B1, positions_B1, cache)[:, -1]
        positions_B1 += 1
    yield from [(row.number, row.end("cancelled")) for row in rows if not row.finished]


def _prefill(network: Any, rows: list[_Sequence], device: torch.device, cancelled: Cancelled
             ) -> tuple[Cache, Tensor | None]:
    """The cache, and the last hidden states [B, D], None if cancelled; equal prompts are prefilled
    once."""
    first = {row.prefix: row for row in rows}
    distinct, place = list(first.values()), {prefix: b for b, prefix in enumerate(first)}
    tokens_BT = pad_sequence([torch.tensor(row.prompt) for row in distinct], batch_first=True,
                             padding_side="left").to(device)
    longest = tokens_BT.shape[1]
    pads = [longest - len(row.prompt) for row in distinct]
    positions_BT = (torch.arange(longest) - torch.tensor(pads)[:, None]).clamp(min=0).to(device)
    images = [tiles for row in distinct if row.images is not None
              for tiles in row.images.split(_TILES)]
    if images:  # encoded once, whatever the chunks; each of these gets the features of its tokens
        features_MD = torch.cat([network.encode_images(tiles.to(device)) for tiles in images])
        is_image_BT = tokens_BT == network.config.image_token_index
        number_BT = is_image_BT.flatten().cumsum(0).view_as(is_image_BT) - 1
    cache = Cache(pads, device)
    chunk = max(16, min(_CHUNK, _CHUNK_TOKENS // len(distinct)))
    for start in range(0, longest, chunk):
        if cancelled and cancelled():
            return cache, None
        here, features = slice(start, start + chunk), {}
        if images:
            features["features_MD"] = features_MD[number_BT[:, here][is_image_BT[:, here]]]
        hidden_BTD = network(tokens_BT[:, here], positions_BT[:, here], cache, **features)
    chosen = [place[row.prefix] for row in rows]
    if len(distinct) < len(rows):
        cache.select(chosen)
    return cache, hidden_BTD[chosen, -1]

"""Continuing prompts: many at once (`generate`), or one as it comes (`stream`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.engine.cache import Cache
from vicugna.engine.sampling import Sampler, Sampling, TopLogprobs
from vicugna.errors import VicugnaError
from vicugna.tokenizer import StreamDecoder, Tokenizer

_CHUNK = 2048  # columns of the prompts read in one call of the network, at most
_CHUNK_TOKENS = 8192  # and tokens over all rows: bounds the memory of activations
Cancelled = Callable[[], bool]


@dataclass
class Completion:
    """What followed one prompt.

    `tokens` holds all that were chosen, an end-of-turn token included; `text` neither holds that
    token nor a stop string. `logprobs` are float32, under the network's own distribution whatever
    the sampling. `finish_reason` is "stop" (end token or stop string), "length" (max_new_tokens or
    the context's end) or "cancelled".
    """

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
             sampling: Sampling | list[Sampling], cancelled: Cancelled | None = None
             ) -> list[Completion]:
    """Continue every prompt, all in one batch, on the device of the network's weights.

    Equal prompts are read once. With one `sampling` for all, copies of a prompt get streams of
    their own (seed and number of the copy); with a list, a row's stream is its seed's alone.
    Without a tokenizer there are no end tokens, no stop strings and no text.

    Memory: 2 * key/value heads * head width * bytes of the dtype for every row, token (of the
    longest prompt and its reply) and layer without a window; nothing is split, so a caller with
    many or very uneven prompts sorts them by length and calls with what fits.

    Raises VicugnaError for an empty prompt, one longer than the context, tokens outside the
    vocabulary, stop strings without a tokenizer, and weights that give NaN.
    """
    completions = [Completion(prompt_tokens=len(prompt)) for prompt in prompts]
    rows = _rows(network, tokenizer, prompts, sampling)
    for deltas in _steps(network, rows, cancelled or (lambda: False)):
        for number, delta in deltas:
            completion = completions[number]
            completion.tokens += delta.tokens
            completion.logprobs += delta.logprobs
            completion.top_logprobs += delta.top_logprobs
            completion.finish_reason = delta.finish_reason or completion.finish_reason
            completion.text += delta.text
    return completions


def stream(network: nn.Module, tokenizer: Tokenizer | None, prompt: list[int], sampling: Sampling,
           cancelled: Cancelled | None = None) -> Iterator[Delta]:
    """Continue one prompt, a `Delta` a token; the same completion as `generate`'s.

    A text never holds half a character, nor the beginning of what may become a stop string: such
    text comes with a later delta. Raises as `generate` does, at the call.
    """
    rows = _rows(network, tokenizer, [prompt], sampling)
    steps = _steps(network, rows, cancelled or (lambda: False))
    return (delta for deltas in steps for _, delta in deltas)


class _Text:
    """A reply's text as it comes, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it."""
        text = self._held + self._decoder.push(token)
        # The stop string that is complete first, as if characters came one by one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            self._decoder.finish()  # forget a character that the last token began
            return text[: min(found)[1]], True
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """The text that was still held back."""
        return self._held + self._decoder.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:n])), 0)


@dataclass
class _Row:
    """One prompt on its way."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    copy: int
    room: int  # tokens that may still be chosen
    eos_ids: tuple[int, ...]
    text: _Text | None
    done: bool = False

    def push(self, token: int, logprob: float, top: TopLogprobs) -> Delta:
        """Take a chosen token."""
        self.room -= 1
        ended, text, cut = token in self.eos_ids, "", False
        if self.text is not None and not ended:
            text, cut = self.text.push(token)
        reason = "stop" if ended or cut else "length" if self.room == 0 else None
        if reason is not None:
            text += self.end(reason).text
        return Delta(text, [token], [logprob], [top] if top else [], reason)

    def end(self, reason: str) -> Delta:
        """Finish without another token."""
        self.done = True
        return Delta("" if self.text is None else self.text.finish(), [], [], [], reason)


def _rows(network: nn.Module, tokenizer: Tokenizer | None, prompts: list[list[int]],
          sampling: Sampling | list[Sampling]) -> list[_Row]:
    """Check the prompts and make a row of each."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    if len(samplings) != len(prompts):
        raise VicugnaError(f"{len(prompts)} prompts but {len(samplings)} samplings", "generate",
                           "Give one for all, or one for each")
    config: Any = network.config
    context, copies = config.max_position_embeddings, Counter[tuple[int, ...]]()
    rows = []
    for number, (prompt, chosen) in enumerate(zip(map(tuple, prompts), samplings, strict=True)):
        _check(prompt, f"prompt {number + 1}", context, config.vocab_size)
        if chosen.stop and tokenizer is None:
            raise VicugnaError("stop strings need a tokenizer", "sampling", "Give one")
        rows.append(_Row(number, prompt, chosen, copies[prompt] if samplings is not sampling else 0,
                         min(chosen.max_new_tokens, context - len(prompt)),
                         () if tokenizer is None else tokenizer.eos_ids,
                         None if tokenizer is None else _Text(tokenizer, chosen.stop)))
        copies[prompt] += 1
    return rows


def _check(prompt: tuple[int, ...], where: str, context: int, vocab_size: int) -> None:
    if not prompt:
        raise VicugnaError("the prompt is empty", where, "Give at least one token")
    if len(prompt) > context:
        raise VicugnaError(f"{len(prompt)} tokens, but the context holds {context}", where,
                           "Shorten it, or use a model with a longer context")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise VicugnaError(f"tokens reach from {min(prompt)} to {max(prompt)}, but the vocabulary "
                           f"has {vocab_size}", where,
                           "Use the model's own tokenizer")


@torch.inference_mode()
def _steps(network: nn.Module, rows: list[_Row], cancelled: Cancelled
           ) -> Iterator[list[tuple[int, Delta]]]:
    """The one loop of generation: what each unfinished row gained, step by step."""
    yield [(row.number, row.end("length")) for row in rows if row.room == 0]
    rows = [row for row in rows if row.room > 0]
    if not rows:
        return
    head: Any = network.lm_head
    device = next(network.parameters()).device
    cache, hidden_BD = _prefill(network, [row.prompt for row in rows], device, cancelled)
    sampler = Sampler([row.sampling for row in rows], [row.copy for row in rows], device)
    positions_B1 = torch.tensor([[len(row.prompt)] for row in rows], device=device)
    while hidden_BD is not None:
        tokens, logprobs, tops = sampler.choose(head(hidden_BD))
        yield [(row.number, row.push(token, logprob, top)) for row, token, logprob, top
               in zip(rows, tokens, logprobs, tops, strict=True) if not row.done]
        alive = [b for b, row in enumerate(rows) if not row.done]
        if not alive:
            return
        if cancelled():
            break
        if 8 * len(alive) <= 7 * len(rows):  # seldom enough for the copies not to matter
            rows, tokens = [rows[b] for b in alive], [tokens[b] for b in alive]
            positions_B1 = positions_B1[alive]
            cache.keep(alive)
            sampler.keep(alive)
        tokens_B1 = positions_B1.new_tensor(tokens)[:, None]
        hidden_BD = network(tokens_B1, positions_B1, cache)[:, -1]
        positions_B1 += 1
    yield [(row.number, row.end("cancelled")) for row in rows if not row.done]


def _prefill(network: nn.Module, prompts: list[tuple[int, ...]], device: torch.device,
             cancelled: Cancelled) -> tuple[Cache, Tensor | None]:
    """Read the prompts, equal ones once: the cache, and the last hidden states [B, D] or, when
    cancelled, None."""
    distinct = list(dict.fromkeys(prompts))
    longest = max(map(len, distinct))
    pads = [longest - len(prompt) for prompt in distinct]
    tokens_BT = torch.tensor([(0,) * pad + prompt
                              for pad, prompt in zip(pads, distinct, strict=True)], device=device)
    positions_BT = torch.arange(longest, device=device) - torch.tensor(pads, device=device)[:, None]
    positions_BT.clamp_(min=0)
    cache = Cache(pads, device)
    chunk = max(16, min(_CHUNK, _CHUNK_TOKENS // len(distinct)))
    for start in range(0, longest, chunk):
        if cancelled():
            return cache, None
        here = slice(start, start + chunk)
        hidden_BTD = network(tokens_BT[:, here], positions_BT[:, here], cache)
    hidden_BD = hidden_BTD[:, -1]
    if len(distinct) < len(prompts):
        rows = list(map({prompt: b for b, prompt in enumerate(distinct)}.__getitem__, prompts))
        cache.keep(rows)
        hidden_BD = hidden_BD[rows]
    return cache, hidden_BD

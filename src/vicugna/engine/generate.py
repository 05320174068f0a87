"""Generation: many prompts (`generate`), or one as a stream (`stream`)."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vicugna.engine.engine import Engine
from vicugna.engine.sampling import Sampling, TopLogprobs
from vicugna.engine.sequence import Request
from vicugna.engine.text import Delta, TextStream
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

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


def generate(network: nn.Module, tokenizer: Tokenizer | None, prompts: list[list[int]],
             sampling: Sampling | list[Sampling], cancelled: Cancelled = None,
             images: list[Tensor | None] | None = None) -> list[Completion]:
    """Continue every prompt, on the device of the network's weights; as many at once as memory
    and the engine's slots allow, the others as soon as one has ended.

    `images` are the tiles [N, 3, H, W] of each prompt's images, or None for a prompt without any.
    Equal prompts, with the very same images, are prefilled once. With one `sampling` for all,
    copies of a prompt get random streams of their own (seed and number of the copy); with a list,
    a row's stream is its seed's alone.
    Without a tokenizer there are no end tokens, no stop strings and no text.
    Raises VicugnaError for an empty prompt, one longer than the context, tokens outside the
    vocabulary, image tokens that do not fit the images, stop strings without a tokenizer, and
    weights that give NaN.
    """
    completions = [Completion(prompt_tokens=len(prompt)) for prompt in prompts]
    requests = _requests(tokenizer, prompts, sampling, images)
    for number, delta in _deltas(network, tokenizer, requests, cancelled):
        completion = completions[number]
        completion.tokens += delta.tokens
        completion.logprobs += delta.logprobs
        completion.top_logprobs += delta.top_logprobs
        completion.finish_reason = delta.finish_reason or completion.finish_reason
        completion.text += delta.text
    return completions


def stream(network: nn.Module, tokenizer: Tokenizer | None, prompt: list[int], sampling: Sampling,
           cancelled: Cancelled = None, images: Tensor | None = None, engine: Engine | None = None
           ) -> Generator[Delta, None, None]:
    """Continue one prompt, a `Delta` a step; the same completion as `generate`'s. An `engine` of
    this network that does nothing else keeps what it has read for the next prompt that begins
    with the same tokens. Raises as `generate` does, at the call.
    """
    requests = _requests(tokenizer, [prompt], sampling, [images])
    deltas = _deltas(network, tokenizer, requests, cancelled, engine)
    return (delta for _, delta in deltas)


def _requests(tokenizer: Tokenizer | None, prompts: list[list[int]],
              sampling: Sampling | list[Sampling], images: list[Tensor | None] | None
              ) -> list[Request]:
    """The engine's requests."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    tiles = [None] * len(prompts) if images is None else images
    for name, given in (("samplings", len(samplings)), ("lists of images", len(tiles))):
        if given != len(prompts):
            raise VicugnaError(f"{len(prompts)} prompts but {given} {name}", "generate",
                               "Pass one for all, or one for each prompt")
    if tokenizer is None and any(one.stop for one in samplings):
        raise VicugnaError("stop strings need a tokenizer", "sampling",
                           "Pass a tokenizer, or no stop strings")
    eos_ids = tuple(tokenizer.eos_ids) if tokenizer else ()
    requests, copies = [], Counter[Any]()
    for prompt, one, own in zip(prompts, samplings, tiles, strict=True):
        request = Request(tuple(prompt), one, own, eos_ids)
        if samplings is not sampling:
            request = Request(request.prompt, one, own, eos_ids, copies[request.prefix])
            copies[request.prefix] += 1
        requests.append(request)
    return requests


def _deltas(network: nn.Module, tokenizer: Tokenizer | None, requests: list[Request],
            cancelled: Cancelled, engine: Engine | None = None) -> Iterator[tuple[int, Delta]]:
    """What each request gains, step by step."""
    if engine is None:
        config: Any = network.config
        lengths = [min(len(one.prompt) + one.sampling.max_new_tokens, config.context_length)
                   for one in requests]
        engine = Engine(network, tokens=sum(lengths), slots=max(1, min(len(requests), 256)))
    numbers = {}
    for number, request in enumerate(requests):
        try:
            numbers[engine.add(request)] = number
        except VicugnaError as error:
            where = f"prompt {number + 1}" if error.where == "prompt" else error.where
            raise VicugnaError(error.what, where, error.fix) from None
    return _steps(engine, numbers,
                  {id: TextStream(tokenizer, requests[n].sampling.stop)
                   for id, n in numbers.items()}, cancelled)


def _steps(engine: Engine, numbers: dict[int, int], texts: dict[int, TextStream],
           cancelled: Cancelled) -> Iterator[tuple[int, Delta]]:
    """The generation loop."""
    try:
        while texts:
            if cancelled and cancelled():
                yield from ((numbers[id], Delta(text.finish(), finish_reason="cancelled"))
                            for id, text in texts.items())
                return
            for output in engine.step():
                delta = texts[output.id].push(output)
                if delta.finish_reason:
                    engine.cancel(output.id)
                    del texts[output.id]
                yield numbers[output.id], delta
    finally:
        for id in texts:
            engine.cancel(id)

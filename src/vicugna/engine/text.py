"""The layer above the engine: tokens become text, which may hold half a character back, and which
stop strings end."""

from dataclasses import dataclass, field

from vicugna.engine.sampling import TopLogprobs
from vicugna.engine.sequence import Output
from vicugna.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Delta:
    """One step of a completion; texts joined are `Completion.text`. The last has a reason."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


class TextStream:
    """The text of one completion; without a tokenizer there is none.

    A text never holds half a character, nor the beginning of what may become a stop string: such
    text comes with a later delta. It is cut before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._eos_ids = tokenizer.eos_ids if tokenizer else ()
        self._stop, self._pending = stop, ""  # pending: what may become a stop string

    def push(self, output: Output) -> Delta:
        """The delta of a step. Its reason is "stop" where a stop string is complete: the request
        must then be cancelled, and tokens after the one that completed it are left out."""
        delta = Delta()
        for n, token in enumerate(output.tokens):
            delta.tokens.append(token)
            delta.logprobs.append(output.logprobs[n])
            delta.top_logprobs += output.top_logprobs[n : n + 1]
            if self._decoder and token not in self._eos_ids:
                text, stopped = self._push(self._decoder.push(token))
                delta.text += text
                if stopped:
                    delta.finish_reason = "stop"
                    return delta
        if output.finish_reason:
            delta.text += self.finish()
            delta.finish_reason = output.finish_reason
        return delta

    def finish(self) -> str:
        """The text that was held back."""
        return self._pending + self._decoder.finish() if self._decoder else ""

    def _push(self, text: str) -> tuple[str, bool]:
        """The text that is certain, and whether a stop string ends it."""
        text = self._pending + text
        # The stop string that is complete first, as if characters came one by one.
        if found := [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]:
            return text[: min(found)[1]], True
        certain = len(text) - max((n for stop in self._stop for n in range(1, len(stop))
                                   if text.endswith(stop[:n])), default=0)
        self._pending = text[certain:]
        return text[:certain], False

"""What server and terminal chat share: checked prompts, and replies split as they stream."""

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from vicugna import engine
from vicugna.engine import Delta, Sampling
from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
Replies = Generator[tuple[str, str, bool, Delta], None, None]


class ContextExceeded(VicugnaError):
    """The prompt leaves no room for an answer."""


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer; VicugnaError when it has none."""
    if model.tokenizer is None:
        raise VicugnaError("this model has no tokenizer, so it cannot chat", "tokenizer.json",
                           "Add its tokenizer files to its folder")
    return model.tokenizer


def read_chat(model: Model, messages: list[dict[str, Any]]) -> tuple[list[int], Tensor | None]:
    """Tokens of messages to answer, never cut, and the tiles of their pictures (`Model.read`).

    Raises ContextExceeded, with both counts, when no room is left for an answer.
    """
    (tokens, images), context = model.read(messages), model.config.context_length
    if len(tokens) >= context:
        raise ContextExceeded(f"the conversation is {len(tokens)} tokens long, and the model's "
                              f"context holds {context} tokens, answer included", "",
                              "Shorten it, or begin a new one")
    return tokens, images


def reply(model: Model, prompt: list[int], sampling: Sampling,
          cancelled: Callable[[], bool] | None = None, images: Tensor | None = None) -> Replies:
    """Stream the reply as (new reasoning, new answer, whether it is thinking, delta)."""
    splitter = ReasoningSplitter(tokenizer_of(model), prompt)
    for delta in engine.stream(model.network, model.tokenizer, prompt, sampling, cancelled, images):
        reasoning, answer = splitter.push(delta.text, delta.finish_reason is not None)
        yield reasoning, answer, bool(reasoning) or splitter.inside, delta


class ReasoningSplitter:
    """Splits a reply into reasoning and answer as it comes.

    Reasoning is what stands between `<think>` at the very start and the next `</think>`; newlines
    beside the markers belong to neither. Text that may turn out to be a marker is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        opened = tokenizer.opens_reasoning(prompt)  # as some templates do themselves
        self._text, self._given = OPEN if opened else "", ("", "")
        self.inside = opened  # whether the text so far ends inside the reasoning

    def push(self, text: str, last: bool) -> tuple[str, str]:
        """The new (reasoning, answer) text; after the `last` piece nothing is held back."""
        self._text += text
        (old_reasoning, old_answer), self._given = self._given, self._split(last)
        return self._given[0][len(old_reasoning):], self._given[1][len(old_answer):]

    def _split(self, last: bool) -> tuple[str, str]:
        start = self._text.lstrip()
        if not start.startswith(OPEN):
            return "", "" if OPEN.startswith(start) and not last else self._text
        thought, closed, answer = start.removeprefix(OPEN).partition(CLOSE)
        self.inside = not closed
        if self.inside and not last:
            half_marker = max(n for n in range(len(CLOSE)) if thought.endswith(CLOSE[:n]))
            thought = thought[:len(thought) - half_marker]
        if closed or not last:
            thought = thought.rstrip("\n")
        return thought.lstrip("\n"), answer.lstrip("\n")

"""What server and terminal chat share: checked prompts, and replies split as they stream."""

from __future__ import annotations

from typing import Any

from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


class ContextExceeded(VicugnaError):
    """The prompt leaves no room for an answer."""


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer; VicugnaError when it has none."""
    if model.tokenizer is None:
        raise VicugnaError("this model has no tokenizer, so it cannot chat", "tokenizer.json",
                           "Add its tokenizer files to its folder")
    return model.tokenizer


def prompt_tokens(model: Model, messages: list[dict[str, Any]]) -> list[int]:
    """Tokens of messages to answer; never cut.

    Raises ContextExceeded, with both counts, when no room is left for an answer.
    """
    tokens, context = tokenizer_of(model).chat(messages), model.config.max_position_embeddings
    if len(tokens) >= context:
        raise ContextExceeded(f"the conversation is {len(tokens)} tokens long, and the model's "
                              f"context holds {context} tokens, answer included", "",
                              "Shorten it, or begin a new one")
    return tokens


class ReasoningSplitter:
    """Splits a reply into reasoning and answer as it comes.

    Reasoning is what stands between `<think>` at the very start and the next `</think>`; newlines
    beside the markers belong to neither. Text that may turn out to be a marker is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        """Some templates open the reasoning themselves: the reply then begins inside it."""
        self._state = "reasoning" if tokenizer.id_of(OPEN) in prompt[-2:] else "start"
        self._fresh = self.reasoning  # just after a marker: newlines are dropped
        self._held = ""

    @property
    def reasoning(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return self._state == "reasoning"

    def push(self, text: str, last: bool) -> tuple[str, str]:
        """The new (reasoning, answer) text; after the `last` piece nothing is held back."""
        text, self._held = self._held + text, ""
        if self._state == "start":
            start = text.lstrip()
            if not last and len(start) < len(OPEN) and OPEN.startswith(start):
                self._held = text
                return "", ""
            self._fresh = start.startswith(OPEN)
            self._state = "reasoning" if self._fresh else "answer"
            text = start[len(OPEN):] if self._fresh else text
        if not self.reasoning:
            return "", self._trimmed(text)
        thought, closed, text = text.partition(CLOSE)
        thought = self._trimmed(thought)
        if closed:
            self._state, self._fresh = "answer", True
            return thought.rstrip("\n"), self._trimmed(text)
        keep = len(thought) if last else len(thought) - _undecided(thought)
        self._held = thought[keep:]
        return thought[:keep], ""

    def _trimmed(self, text: str) -> str:
        text = text.lstrip("\n") if self._fresh else text
        self._fresh = self._fresh and not text
        return text


def _undecided(thought: str) -> int:
    """How many characters at the end may be the newlines and beginning of a closing marker."""
    marker = next((n for n in range(min(len(CLOSE) - 1, len(thought)), 0, -1)
                   if thought.endswith(CLOSE[:n])), 0)
    body = thought[:len(thought) - marker]
    return marker + len(body) - len(body.rstrip("\n"))

"""Whether a rendered turn holds all of the assistant's message that it was rendered from."""

import json
import re
from collections.abc import Iterator
from typing import Any

from vicugna.chat.messages import Message, calls_of, json_object, reasoning_of
from vicugna.tokenizer import END_THINK, THINK

_REASONED = re.compile(rf"\s*{THINK}(.*?){END_THINK}(.*)", re.DOTALL)


def reasoning_apart(message: Message) -> Message:
    """An assistant's message whose content begins with <think>...</think>, as many data sets have
    it, with that as its reasoning."""
    content = message.get("content")
    found = _REASONED.match(content) if isinstance(content, str) else None
    if not found or message["role"] != "assistant" or reasoning_of(message):
        return message
    return {**message, "reasoning": found[1].strip("\n"), "content": found[2].lstrip("\n")}


def left_out(message: Message, turn: str) -> str | None:
    """Which part of a message its rendered turn lacks: "reasoning", "content", "tool calls" or
    None. White space does not count; what is in JSON counts as well."""
    turn, reasoning, content = _squeezed(turn), reasoning_of(message), message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    left = _without([reasoning, *texts], turn)
    if left is None:
        return "content" if _without(texts, turn) is None else "reasoning"
    for call in calls_of(message):
        arguments = call["arguments"]
        if isinstance(arguments, str) and _squeezed(arguments) not in left:
            arguments = json_object(arguments) or arguments
        if not all(any(form in left for form in _forms(leaf))
                   for leaf in (call["name"], *_leaves(arguments))):
            return "tool calls"
    return None


def _without(texts: list[str], turn: str) -> str | None:
    """A turn without these texts, in which none is found twice; None if it lacks one of them."""
    for text in texts:
        found = next((form for form in _forms(text) if form in turn), None)
        if found is None:
            return None
        turn = turn.replace(found, "\0", 1)
    return turn


def _leaves(value: Any) -> list[Any]:
    """The keys, texts and numbers in a JSON value."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [value]


def _forms(value: Any) -> Iterator[str]:
    """How a template may write a text or a number: as it is, or in JSON."""
    yield _squeezed(str(value))
    for ascii in (False, True):
        written = json.dumps(value, ensure_ascii=ascii)
        yield _squeezed(written[1:-1] if isinstance(value, str) else written)


def _squeezed(text: str) -> str:
    return "".join(text.split())

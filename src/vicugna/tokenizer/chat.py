"""From messages to marked text, in which nothing that a person wrote can be a control token."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.tokenizer.sandbox import Template

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def check_messages(messages: Any, where: str = "messages") -> None:
    """Raise VicugnaError, naming the message's index, unless `messages` is a chat."""
    if not isinstance(messages, list) or not messages:
        raise VicugnaError("not a list of messages, or an empty one", where,
                           'Give [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        if problem := _problem(message):
            raise VicugnaError(problem, f"{where}[{index}]",
                               'A message looks like {"role": "user", "content": "..."}')


def _problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"a message must be an object, not {type(message).__name__}"
    role = message.get("role")
    if role not in ROLES:
        return f"role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}"
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        return "only an assistant's message may have tool_calls"
    content = message.get("content")
    if content is None and not calls:
        return "content is missing"
    if not isinstance(content, str | None):
        return f"content must be text, not {type(content).__name__}"
    if not isinstance(message.get("reasoning") or "", str):
        return "reasoning must be text"
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return 'tool_calls must be a list of {"name": "...", "arguments": {...}}'
    return None


def _is_call(call: Any) -> bool:
    called = call.get("function", call) if isinstance(call, dict) else None
    return (isinstance(called, dict) and isinstance(called.get("name"), str)
            and isinstance(called.get("arguments"), dict | str))


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    """Any JSON with all its strings and keys changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


class Renderer:
    """Renders one chat, or its beginnings, so that people's text cannot spell a control token.

    The first character of every such token (usually just "<") is swapped in their text for a
    private-use character that occurs nowhere in the input, so the template may trim, split and join
    it. `lift` swaps them back in the pieces that are then encoded as plain text.
    """

    def __init__(self, template: Template, names: dict[str, str], controls: Iterable[str],
                 messages: Any, tools: Any) -> None:
        check_messages(messages)
        # Hugging Face templates differ in what they call reasoning.
        messages = [{"reasoning_content": m["reasoning"], "thinking": m["reasoning"], **m}
                    if m.get("reasoning") else m for m in messages]
        texts: list[str] = []
        _mapped([messages, tools], texts.append)
        text = "".join(texts)
        firsts = [first for first in sorted({name[0] for name in controls}) if first in text]
        private = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE)))
        free = (mark for mark in private if mark not in text and mark not in template.source)
        self._swaps = list(zip(firsts, free, strict=False))
        if len(self._swaps) < len(firsts):
            raise VicugnaError("every private-use character is in use", "messages", "Use fewer")
        self._messages, tools = _mapped([messages, tools], self._hide)
        self._render = partial(template.render, len(text), tools=tools, documents=None, **names)

    def _hide(self, text: str) -> str:
        return reduce(lambda text, swap: text.replace(*swap), self._swaps, text)

    def lift(self, text: str) -> str:
        """Rendered text as people wrote it."""
        return reduce(lambda text, swap: text.replace(*swap[::-1]), self._swaps, text)

    def text(self, count: int | None = None, prompt: bool = False) -> str:
        """The text of the first `count` messages (all by default), people's characters swapped."""
        return self._render(messages=self._messages[:count], add_generation_prompt=prompt)

    def starts(self, whole: str) -> Iterator[int]:
        """Where in `whole`, the text of all messages, each assistant's own words begin."""
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                prompt = self.text(index, prompt=True) if index else None
                if prompt is None or not whole.startswith(prompt):
                    raise VicugnaError("this template cannot show what the assistant said here",
                                       f"messages[{index}]", "Begin with a system or user message, "
                                       "and use a template that leaves earlier turns unchanged")
                yield len(prompt)

"""From messages to marked text, in which nothing that a person wrote can be a control token."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vicugna.chat.sandbox import Template
from vicugna.errors import VicugnaError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # its names in templates
RARE = (0x20000, 0x2A6DE)
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def check_messages(messages: Any, where: str = "messages", images: bool = True) -> None:
    """Raise VicugnaError, naming the message's index, unless `messages` is a chat; without
    `images`, one of text alone."""
    if not isinstance(messages, list) or not messages:
        raise VicugnaError("not a list of messages, or an empty one", where,
                           'Give [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        if problem := _problem(message):
            raise VicugnaError(problem, f"{where}[{index}]",
                               'A message looks like {"role": "user", "content": "..."}')
    if not images and (found := image_parts(messages)):
        raise VicugnaError("pictures are not taken here", f"{where}[{min(found)[0]}]",
                           "Use text alone")


def image_parts(messages: list[Message]) -> dict[tuple[int, int], Message]:
    """The pictures of a chat, by the index of their message and of their part in it."""
    return {(m, p): part for m, message in enumerate(messages)
            if isinstance(content := message.get("content"), list)
            for p, part in enumerate(content)
            if isinstance(part, dict) and "image" in str(part.get("type"))}


def _problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"a message must be an object, not {type(message).__name__}"
    role = message.get("role")
    if role not in (*ROLES, "ipython"):  # Llama's own name for a tool
        return f"role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}"
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        return "only an assistant's message may have tool_calls"
    content = message.get("content")
    if content is None and not calls:
        return "content is missing"
    if not (isinstance(content, str | None) or _is_parts(content)
            or (role in ("tool", "ipython") and isinstance(content, dict | list))):
        return ('content must be text, or a list of parts such as {"type": "text", "text": "..."}, '
                f"not {type(content).__name__}")
    if not all(isinstance(message.get(key), str | None) for key in REASONING):
        return "reasoning must be text"
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return 'tool_calls must be a list of {"name": "...", "arguments": {...}}'
    return None


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str)
        and (part["type"] != "text" or isinstance(part.get("text"), str)) for part in content)


def _is_call(call: Any) -> bool:
    called = call.get("function", call) if isinstance(call, dict) else None
    return (isinstance(called, dict) and isinstance(called.get("name"), str)
            and isinstance(called.get("arguments"), dict | str))


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    """Any JSON with all its strings and keys changed; the type's name for what is not JSON, such
    as an image, whose methods are none of a template's business."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value if isinstance(value, int | float | None) else f"({type(value).__name__})"


def _as_templates_expect(message: Message) -> Message:
    """Without null fields, and with the reasoning under its newer names too: as transformers."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = [message[key] for key in REASONING if key in message]
    return {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]
            } if reasoning else message


def breaking(controls: Iterable[str]) -> list[str]:
    """What to swap in a text so that it spells none of `controls`: of each its first character that
    does not occur in words (usually that is "<"), or the whole of a token that is a word."""
    return sorted({next((part for part in name if not (part.isalnum() or part == "_")), name)
                   for name in controls})


class Renderer:
    """Renders one chat, or its beginnings, so that people's text cannot spell a control token.

    One character of every such token (see `breaking`) is swapped in their text for a rare one that
    occurs nowhere in the input, so the template may trim, split, measure and join it; what the
    template looks for in their text, as </think>, is swapped as well (see sandbox.py). `lift` swaps
    them back, once the template's own control tokens are sealed.
    """

    def __init__(self, template: Template, names: dict[str, str], messages: Any, tools: Any
                 ) -> None:
        check_messages(messages)
        messages = list(map(_as_templates_expect, messages))
        texts: list[str] = []
        _mapped([messages, tools], texts.append)
        text = "".join(texts)
        found = [part for part in template.parts if part in text]
        # Rare ideographs, as neither case nor Python's repr changes them.
        free = (mark for mark in map(chr, range(*RARE))
                if mark not in text and mark not in template.source)
        self._swaps = list(zip(found, free, strict=False))
        if len(self._swaps) < len(found):
            raise VicugnaError("every rare ideograph is in use", "messages", "Use fewer")
        self._messages, tools = _mapped([messages, tools], self._hide)
        size = len(str([self._messages, tools]))
        self._render = partial(template.render, size, self._hide, tools=tools, documents=None,
                               **names)

    def _hide(self, text: str) -> str:
        for part, mark in self._swaps:
            text = text.replace(part, mark + part[1:])
        return text

    def lift(self, text: str) -> str:
        """Rendered text as people wrote it."""
        for part, mark in self._swaps:
            text = text.replace(mark, part[0])
        return text

    def text(self, count: int | None = None, prompt: bool = False) -> str:
        """The text of the first `count` messages (all by default), people's characters swapped.
        VicugnaError where the template takes no parts, and would show them as a list of Python."""
        messages = self._messages[:count]
        text = self._render(messages=messages, add_generation_prompt=prompt)
        for index, message in enumerate(messages):
            content = message.get("content")
            if content and _is_parts(content) and str(content) in text:
                raise VicugnaError("this model's chat template takes text only",
                                   f"messages[{index}]", "Give its content as one text")
        return text

    def starts(self, whole: str) -> Iterator[int]:
        """Where in `whole`, the text of all messages, each assistant's own words begin: where the
        prompt for them ends, less what the template ends only prompts with, as <think>."""
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                prompt = self.text(index, prompt=True) if index else ""
                start = len(prompt)
                if not whole.startswith(prompt):
                    pairs = enumerate(zip(whole, prompt, strict=False))
                    start = next((n for n, (a, b) in pairs if a != b), len(whole))
                if not index or (start < len(prompt) and start < len(self.text(index))):
                    raise VicugnaError("this template cannot show what the assistant said here",
                                       f"messages[{index}]", "Begin with a system or user message, "
                                       "and use a template that leaves earlier turns unchanged")
                yield start

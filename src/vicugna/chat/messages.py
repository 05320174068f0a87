"""Messages of a chat: what is one, and which of their parts are images."""

import json
from contextlib import suppress
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.tokenizer.bpe import ROLES

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # its names in templates


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


def check_tools(tools: Any, where: str = "tools") -> None:
    """Raise VicugnaError unless `tools` is None or a list of objects, as chat templates take it."""
    if tools is not None and not (isinstance(tools, list)
                                  and all(isinstance(tool, dict) for tool in tools)):
        raise VicugnaError("tools must be a list of objects", where,
                           'Give [{"type": "function", "function": {"name": ..., ...}}]')


def image_parts(messages: list[Message]) -> dict[tuple[int, int], Message]:
    """The pictures of a chat, by the index of their message and of their part in it."""
    return {(m, p): part for m, message in enumerate(messages)
            if isinstance(content := message.get("content"), list)
            for p, part in enumerate(content)
            if isinstance(part, dict) and "image" in str(part.get("type"))}


def reasoning_of(message: Message) -> str:
    """A message's reasoning, under whichever name; "" without any."""
    return next((message[key] for key in REASONING if message.get(key)), "")


def calls_of(message: Message) -> list[dict[str, Any]]:
    """A message's tool calls, each {"name": text, "arguments": an object or text}."""
    return [call.get("function", call) for call in message.get("tool_calls") or []]


def json_object(text: str | dict[str, Any]) -> dict[str, Any] | None:
    """The object that a call's arguments are JSON text of, if they are."""
    with suppress(ValueError, RecursionError):
        if isinstance(text, str) and isinstance(value := json.loads(text), dict):
            return value
    return None


def _problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"a message must be an object, not {type(message).__name__}"
    role = message.get("role")
    if role not in (*ROLES, "ipython"):  # Llama's own name for a tool
        return f"role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}"
    if message.get("function_call"):
        return "function_call is not supported: use tool_calls"
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        return "only an assistant's message may have tool_calls"
    content = message.get("content")
    if content is None and not calls:
        return "content is missing"
    if not (isinstance(content, str | None) or is_parts(content)
            or (role in ("tool", "ipython") and isinstance(content, dict | list))):
        return ('content must be text, or a list of parts such as {"type": "text", "text": "..."}, '
                f"not {type(content).__name__}")
    if not all(isinstance(message.get(key), str | None) for key in REASONING):
        return "reasoning must be text"
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return 'tool_calls must be a list of {"name": "...", "arguments": {...}}'
    return None


def is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str)
        and (part["type"] != "text" or isinstance(part.get("text"), str)) for part in content)


def _is_call(call: Any) -> bool:
    called = call.get("function", call) if isinstance(call, dict) else None
    return (isinstance(called, dict) and isinstance(called.get("name"), str)
            and isinstance(called.get("arguments"), dict | str))

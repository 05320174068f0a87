"""Rows of any of the usual forms as documents: plain text, or chats with their tools."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vicugna.chat import check_messages, check_tools
from vicugna.chat.messages import REASONING
from vicugna.data.formats import PAIRS, TURNS
from vicugna.errors import VicugnaError
from vicugna.tokenizer import valid_unicode

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "observation": "tool", "function_response": "tool"}  # ShareGPT's
_FORMS = ('Write {"text": "..."}, {"messages": [{"role": ..., "content": ...}]}, ShareGPT\'s '
          '"conversations", or a pair such as "prompt" and "completion"')


@dataclass(frozen=True)
class Text:
    """A plain document, or a part of a long one, the last one or not."""

    text: str
    last: bool = True


@dataclass(frozen=True)
class Chat:
    """A finished conversation, and the line or row it came from."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


def to_document(row: dict[str, Any], column: str | None, where: str) -> Text | Chat:
    """The document in a row; `column` names the field to use where there are several forms.

    A chat is "messages" or ShareGPT's "conversations" with "tools" and "system" beside them, or a
    pair of fields, one of the user and one of the assistant. What is stored as JSON text, as in
    tables, is decoded. VicugnaError, naming the row, for anything else."""
    row = {key: value for key, value in row.items() if value is not None}
    key = column or _form(row, where)
    if key not in row:
        raise VicugnaError(f'no "{key}"', where, f"There are: {', '.join(map(str, row))}"[:200])
    value, answer = row[key], next((b for a, b in PAIRS if key == a and b in row), None)
    if answer:
        return _chat(_pair(row, key, answer, where), row, where)
    if key not in TURNS and isinstance(value, str):
        return Text(valid_unicode(value, where))
    turns = _decoded(value)
    if not isinstance(turns, list) or key == "text":
        raise VicugnaError(f"text must be a string and messages a list, but {key} is "
                           f"{type(value).__name__}", where,
                           "Store a list in a table as JSON, as json.dumps writes it")
    return _chat(turns, row, where)


def _form(row: dict[str, Any], where: str) -> str:
    """The field that decides what a row is read as."""
    found = [key for key in ("text", *TURNS) if key in row]
    found += [asked for asked, answer in PAIRS if asked in row and answer in row][:1]
    if "chosen" in row and "rejected" in row:
        raise VicugnaError("preference pairs (chosen, rejected) are not trained on here", where,
                           "Give one conversation a row")
    if not found:
        raise VicugnaError(f'neither "text" nor "messages" (there are: '
                           f"{', '.join(map(str, row))[:200]})", where, _FORMS)
    if len(found) > 1:
        raise VicugnaError(f"it has {' and '.join(found)}: ambiguous",
                           where, f"Name one: column: {found[1]}")
    return found[0]


def _decoded(value: Any) -> Any:
    """A value itself or, where it is JSON text of a list or an object, that."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _pair(row: dict[str, Any], asked: str, answered: str, where: str) -> list[Any]:
    """The messages of a question and its answer, of which either may be a list of messages."""
    if row.get("history"):
        raise VicugnaError("a history of earlier turns is not read", where,
                           'Write all turns as "messages"')
    messages: list[Any] = []
    for key, role in ((asked, "user"), (answered, "assistant")):
        given = row[key]
        if isinstance(given, list):
            messages += given
            continue
        if key == "instruction" and row.get("input"):
            given = f"{given}\n\n{row['input']}"
        messages.append({"role": role, "content": given})
    return messages


def _chat(turns: list[Any], row: dict[str, Any], where: str) -> Chat:
    messages = [_message(_decoded(turn), f"{where}, messages[{n}]")
                for n, turn in enumerate(turns)]
    system = row.get("system")
    if system and isinstance(system, str) and not (messages and isinstance(messages[0], dict)
                                                   and messages[0].get("role") == "system"):
        messages.insert(0, {"role": "system", "content": system})
    check_messages(messages, f"{where}, messages", images=False)
    if all(message["role"] != "assistant" for message in messages):
        raise VicugnaError("no assistant message to learn from", where, "Add one")
    tools = _decoded_list(row.get("tools"))
    check_tools(tools, f"{where}, tools")
    return Chat(messages, tools, where)


def _message(turn: Any, where: str) -> Any:
    """A message as chat templates know it; anything else as it is, to be refused."""
    if not isinstance(turn, dict):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn and "value" in turn:
        role, content = str(turn.pop("from")), turn.pop("value")
        turn |= {"role": ROLES.get(role, role), "content": content}
        if role == "function_call":
            raise VicugnaError("ShareGPT's function_call is not read", where,
                               'Write {"role": "assistant", "tool_calls": [...]}')
    if "tool_calls" in turn:
        turn["tool_calls"] = _decoded_list(turn["tool_calls"])
    return {key: value for key, value in turn.items() if value is not None}


def _decoded_list(value: Any) -> Any:
    """A list, or JSON text of one, of objects or JSON texts of them; None for an empty one."""
    value = _decoded(value)
    return (list(map(_decoded, value)) if isinstance(value, list) else value) or None


def plain_texts(one: Text | Chat) -> Iterator[str]:
    """The texts in a document, without the chat template: to train a tokenizer on."""
    if isinstance(one, Text):
        yield one.text
        return
    for message in one.messages:
        yield from [message[key] for key in REASONING if message.get(key)][:1]
        content = message.get("content")
        if isinstance(content, list):
            yield from (part["text"] if isinstance(part, dict) and isinstance(
                part.get("text"), str) else _json(part) for part in content)
        elif content:
            yield content if isinstance(content, str) else _json(content)
        for call in message.get("tool_calls") or []:
            called = call.get("function", call)
            arguments = called["arguments"]
            yield called["name"]
            yield arguments if isinstance(arguments, str) else _json(arguments)
    for tool in one.tools or []:
        yield _json(tool)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

"""Rows of any of the usual forms as documents: plain text, or chats with their tools."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vicugna.chat import check_messages, check_tools
from vicugna.chat.messages import calls_of, reasoning_of
from vicugna.errors import VicugnaError
from vicugna.tokenizer import valid_unicode

TURNS = ("messages", "conversations", "conversation")  # the second and third are ShareGPT's
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
         ("instruction", "response"), ("question", "answer"))  # of the user and the assistant
_FIELDS = {"text", *TURNS, *(key for pair in PAIRS for key in pair)}
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


def columns(names: Sequence[str], column: str | None, where: str) -> list[str]:
    """The columns of a table that `to_document` uses. VicugnaError if it has none of them."""
    used = {column} if column else _FIELDS | {"chosen", "rejected"}
    if used.isdisjoint(names):
        raise VicugnaError(f"no column {column or 'text or messages'} (there are: "
                           f"{', '.join(names[:20])})", where, "Name one with column:")
    beside = {"tools", "system", "input", "history", *(_FIELDS - {"text"} if column else ())}
    return [name for name in names if name in used | beside]


def to_document(row: dict[str, Any], column: str | None, where: str) -> Text | Chat:
    """The document in a row; `column` names the field to use where there are several forms.

    A chat is "messages" or ShareGPT's "conversations" with "tools" and "system" beside them, or a
    pair of fields, one of the user and one of the assistant. What is stored as JSON text, as in
    tables, is decoded. VicugnaError, naming the row, for anything else."""
    row = {key: value for key, value in row.items() if value is not None}
    key = column or _form(row, where)
    if key not in row:
        raise VicugnaError(f'no "{key}"', where, f"There are: {', '.join(map(str, row))}"[:200])
    turns = row[key]
    if answer := next((b for a, b in PAIRS if key == a and b in row), None):
        turns = _pair(row, key, answer, where)
    elif key not in TURNS and isinstance(turns, str):
        return Text(valid_unicode(turns, where))
    messages = _decoded_list(turns)
    if not isinstance(messages, list) or key == "text":
        raise VicugnaError(f"text must be a string and messages a list, but {key} is "
                           f"{type(turns).__name__}", where,
                           "Store a list in a table as JSON, as json.dumps writes it")
    messages = list(map(_message, messages))
    system = row.get("system")
    if system and isinstance(system, str) and all(
            isinstance(message, dict) and message.get("role") != "system"
            for message in messages[:1]):
        messages.insert(0, {"role": "system", "content": system})
    check_messages(messages, f"{where}, messages", images=False)
    if all(message["role"] != "assistant" for message in messages):
        raise VicugnaError("no assistant message to learn from", where, "Add one")
    tools = _decoded_list(row.get("tools")) or None
    check_tools(tools, f"{where}, tools")
    return Chat(messages, tools, where)


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


def _pair(row: dict[str, Any], asked: str, answered: str, where: str) -> list[Any]:
    """The messages of a question and its answer, of which either may be a list of messages."""
    if row.get("history"):
        raise VicugnaError("a history of earlier turns is not read", where,
                           'Write all turns as "messages"')
    question, answer = row[asked], row[answered]
    if asked == "instruction" and row.get("input"):
        question = f"{question}\n\n{row['input']}"
    return [*(question if isinstance(question, list) else [{"role": "user", "content": question}]),
            *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]


def _message(turn: Any) -> Any:
    """A message as chat templates know it; anything else as it is, to be refused."""
    if not isinstance(turn, dict):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn and "value" in turn:
        role = str(turn.pop("from"))
        turn |= {"role": ROLES.get(role, role), "content": turn.pop("value")}
    if calls := _decoded_list(turn.pop("tool_calls", None)):
        turn["tool_calls"] = calls
    return turn


def _decoded(value: Any) -> Any:
    """A value itself or, where it is JSON text of a list, an object or null, that."""
    if isinstance(value, str) and (value.lstrip()[:1] in ("[", "{") or value.strip() == "null"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _decoded_list(value: Any) -> Any:
    """A list, or JSON text of one, of objects or JSON texts of them."""
    value = _decoded(value)
    return list(map(_decoded, value)) if isinstance(value, list) else value


def plain_texts(one: Text | Chat) -> Iterator[str]:
    """The texts in a document, without the chat template: to train a tokenizer on."""
    if isinstance(one, Text):
        yield one.text
        return
    for message in one.messages:
        content = message.get("content") or ""
        parts = [part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str)
                 else _json(part) for part in content] if isinstance(content, list) else [content]
        calls = ([call["name"], call["arguments"]] for call in calls_of(message))
        for text in filter(None, (reasoning_of(message), *parts, *chain.from_iterable(calls))):
            yield text if isinstance(text, str) else _json(text)
    yield from map(_json, one.tools or [])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

"""From messages to marked text, in which nothing that a person wrote can be a control token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.tokenizer.sandbox import Template

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")

TEMPLATE = """\
{{- bos_token }}
{%- set listing = namespace(text='') %}
{%- for tool in tools or [] %}
    {%- set listing.text = listing.text + '\\n' + (tool | tojson) %}
{%- endfor %}
{%- if listing.text %}
    {%- set listing.text = 'You may call these tools:' + listing.text %}
    {%- if messages[0].role != 'system' %}
        {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + listing.text + '<|eot_id|>' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning %}
            {{- '<think>' + message.reasoning + '</think>' }}
        {%- endif %}
        {{- (message.content or '') | trim }}
        {%- for call in message.tool_calls or [] %}
            {%- set called = call.function or call %}
            {{- '<|tool_call|>{"name": ' + (called.name | tojson) + ', "arguments": ' }}
            {%- if called.arguments is string %}
                {{- called.arguments }}
            {%- else %}
                {{- called.arguments | tojson }}
            {%- endif %}
            {{- '}<|/tool_call|>' }}
        {%- endfor %}
    {%- else %}
        {{- message.content }}
        {%- if loop.first and message.role == 'system' and listing.text %}
            {{- '\\n\\n' + listing.text }}
        {%- endif %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def check_messages(messages: Any, where: str = "messages") -> None:
    """Raise VicugnaError, naming the message's index, unless `messages` is a chat."""
    if not isinstance(messages, list) or not messages:
        raise VicugnaError("not a list of messages, or an empty one", where,
                           'Give [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        problem = _problem(message)
        if problem:
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
    if not isinstance(message.get("content"), str) and not (
            calls and message.get("content") is None):
        return ("content is missing" if message.get("content") is None else
                f"content must be text, not {type(message['content']).__name__}")
    if not isinstance(message.get("reasoning") or "", str):
        return "reasoning must be text"
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return 'tool_calls must be a list of {"name": "...", "arguments": {...}}'
    return None


def _is_call(call: Any) -> bool:
    called = call.get("function", call) if isinstance(call, dict) else None
    return (isinstance(called, dict) and isinstance(called.get("name"), str)
            and isinstance(called.get("arguments"), dict | str))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(_strings(x) for pair in value.items() for x in pair)
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_strings, value))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


class Veil:
    """Hides the first character of every control token in people's text while a template runs.

    Each such character (usually just "<") is swapped for a private-use character that occurs
    nowhere in the input, so no text of theirs can spell a control token in the rendered chat,
    however the template trims, splits or joins it; `lift` swaps them back in the pieces that
    are then encoded as plain text.
    """

    def __init__(self, controls: Sequence[str], template: str, people: Any) -> None:
        text = "".join(_strings(people))
        self.size = len(text)
        free = (chr(code) for code in chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
                if chr(code) not in text and chr(code) not in template)
        firsts = [first for first in sorted({name[0] for name in controls}) if first in text]
        self.swaps = list(zip(firsts, free, strict=False))
        if len(self.swaps) < len(firsts):
            raise VicugnaError("every private-use character is in use", "messages",
                               "Leave some of them out")

    def hide(self, value: Any) -> Any:
        """`value` (any JSON) with those characters hidden in all its strings and keys."""
        return _mapped(value, self._hide) if self.swaps else value

    def _hide(self, text: str) -> str:
        for first, stand_in in self.swaps:
            text = text.replace(first, stand_in)
        return text

    def lift(self, text: str) -> str:
        """The text as people wrote it."""
        for first, stand_in in self.swaps:
            text = text.replace(stand_in, first)
        return text


class Renderer:
    """Renders one chat, or its beginnings, with people's text hidden behind one veil."""

    def __init__(self, template: Template, names: dict[str, str], controls: Sequence[str],
                 messages: Any, tools: Any) -> None:
        check_messages(messages)
        # Hugging Face templates differ in what they call reasoning.
        known = [{"reasoning_content": m["reasoning"], "thinking": m["reasoning"], **m}
                 if m.get("reasoning") else m for m in messages]
        self.veil = Veil(controls, template.source, [known, tools])
        self._template, self._names = template, names
        self.messages, self._tools = self.veil.hide(known), self.veil.hide(tools)

    def text(self, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """The veiled text of the first `count` messages (all by default)."""
        return self._template.render(self.veil.size, messages=self.messages[:count],
                                     tools=self._tools, documents=None,
                                     add_generation_prompt=add_generation_prompt, **self._names)

    def starts(self, whole: str) -> list[int]:
        """Where in `whole`, the text of all messages, each assistant's own words begin."""
        starts = []
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                prompt = self.text(index, add_generation_prompt=True) if index else None
                if prompt is None or not whole.startswith(prompt):
                    raise VicugnaError(
                        "this template cannot show what the assistant said here",
                        f"messages[{index}]", "Begin with a system or user message, and use a "
                        "template that renders earlier turns unchanged")
                starts.append(len(prompt))
        return starts

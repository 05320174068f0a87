"""From messages to tokens through the chat template, in which no user-provided text can become a
special token."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from datetime import date as Date
from functools import lru_cache, partial
from itertools import accumulate, chain, pairwise
from typing import Any

from vicugna.chat import coverage
from vicugna.chat.messages import (
    REASONING,
    Message,
    calls_of,
    check_messages,
    check_tools,
    is_parts,
    json_object,
    reasoning_of,
)
from vicugna.chat.worker import WORKER
from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tokenizer import END_THINK, THINK, Tokenizer, valid_unicode
from vicugna.tokenizer.limits import text_errors

RARE = (0x20000, 0x2A6DE)  # ideographs
Tools = list[dict[str, Any]] | None


def render(tokenizer: Tokenizer, messages: list[Message], tools: Tools = None,
           add_generation_prompt: bool = True, date: Date | None = None) -> str:
    """The text that the chat template makes of a chat (see `encode`)."""
    rendering = _Rendering(tokenizer, messages, tools, date)
    return rendering.unescape(rendering.text(prompt=add_generation_prompt))


def encode(tokenizer: Tokenizer, messages: list[Message], tools: Tools = None,
           add_generation_prompt: bool = True, date: Date | None = None) -> list[int]:
    """Tokens of a chat, BOS included where the template writes it. Only the template can place
    special tokens.

    `messages` are {"role": "system|user|assistant|tool", "content": text, or a list of parts such
    as {"type": "text", "text": text} and {"type": "image"}}, an assistant's optionally with
    "reasoning" and "tool_calls". `date` is the day that a template may ask for; None is today.
    Raises VicugnaError for anything else, and for a template that refuses or fails."""
    rendering = _Rendering(tokenizer, messages, tools, date)
    return tokenizer.encode(rendering.with_placeholders(rendering.text(add_generation_prompt)))


@text_errors()
def encode_training(tokenizer: Tokenizer, messages: list[Message], tools: Tools = None,
                    date: Date | None = None) -> tuple[list[int], list[bool]]:
    """Tokens of a finished chat, and the loss mask: which of them the assistant would have to
    generate after the same prompt, its end of turn too.

    Reasoning for which the template has no place becomes <think>...</think> before the content.
    Raises VicugnaError, naming the message, where the template leaves out anything else that an
    assistant's message holds, as it would not be learned."""
    check_messages(messages)
    messages = list(map(coverage.reasoning_apart, messages))
    rendering = _Rendering(tokenizer, messages, tools, date)
    text, spans = _assistant_spans(tokenizer, rendering)
    if _left_out(messages, rendering, text, spans):
        rendering.put_reasoning_into_content()
        text, spans = _assistant_spans(tokenizer, rendering)
        for index, part in _left_out(messages, rendering, text, spans):
            raise VicugnaError(f"this model's chat template leaves out the assistant's {part}, "
                               "which would not be learned", f"messages[{index}]",
                               "Use a template that has a place for it, or change the data")
    parts = [rendering.with_placeholders(text[start:end])
             for start, end in pairwise([0, *chain.from_iterable(spans), len(text)])]
    cuts = list(accumulate(map(len, parts[:-1])))
    ids, offsets = tokenizer.encoder.encode_with_offsets(valid_unicode("".join(parts)))
    return ids, [bisect_right(cuts, offset) % 2 == 1 for offset in offsets]


def _assistant_spans(tokenizer: Tokenizer, rendering: "_Rendering"
                     ) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, still escaped, and the (start, end) of each assistant turn in it."""
    text, spans = rendering.text(), list[tuple[int, int]]()
    marks = [(mark.start(), mark.end()) for mark in tokenizer.encoder.pattern.finditer(text)]
    ends = [end for start, end in marks
            if tokenizer.special_tokens[text[start:end]] in tokenizer.eos_ids]
    for start in rendering.starts(text):
        # Where only the prompt opens a special token, as <think>, the cut is before it.
        start = next((a for a, b in marks if a < start < b), start)
        if spans and start < spans[-1][1]:
            raise VicugnaError("this template ends no turn of the assistant with a token",
                               "chat_template.jinja", "Use another template")
        spans.append((start, next((end for end in ends if end > start), len(text))))
    return text, spans


def _left_out(messages: list[Message], rendering: "_Rendering", text: str,
              spans: list[tuple[int, int]]) -> list[tuple[int, str]]:
    """(message index, part) for each assistant turn that lacks a part of its message."""
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [rendering.unescape(text[start:end]) for start, end in spans]
    return [(index, part) for index, turn in zip(replies, turns, strict=True)
            if (part := coverage.left_out(messages[index], turn))]


def digest(tokenizer: Tokenizer, date: Date | None = None) -> str:
    """SHA-256 (hex) of what decides the tokens of a chat: the tokenizer's digest, and the date if a
    template asks for it."""
    if not any("strftime_now" in template for template in tokenizer.templates.values()):
        return tokenizer.digest
    return digest_of([tokenizer.digest, (date or Date.today()).isoformat()])


@lru_cache(maxsize=32)
def _first_symbols(names: tuple[str, ...]) -> list[str]:
    """What to escape in a text so that it spells none of `names`: of each its first character that
    does not occur in words (usually that is "<"), or the whole of a token that is a word."""
    return sorted({next((part for part in name if not (part.isalnum() or part == "_")), name)
                   for name in names})


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
    """Without null fields, and with the reasoning under all of its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = reasoning_of(message)
    return {**message, **dict.fromkeys(REASONING, reasoning)} if reasoning else message


class _Rendering:
    """Renders one chat, or its beginnings, so that user-provided text cannot spell a special token.

    One character of every such token (see `_first_symbols`) is replaced in user-provided text by a
    rare one that occurs nowhere in the input, so the template may trim, split, measure and join it;
    what the template looks for in that text, as </think>, is escaped as well (see sandbox.py).
    `with_placeholders` restores the characters, once the template's own special tokens are safe.
    """

    def __init__(self, tokenizer: Tokenizer, messages: Any, tools: Any, date: Date | None) -> None:
        name = "tool_use" if tools is not None and "tool_use" in tokenizer.templates else "default"
        if name not in tokenizer.templates:
            raise VicugnaError("this tokenizer has no chat template", "chat_template.jinja",
                               "Use plain text, or add a template to the checkpoint")
        source = tokenizer.templates[name]
        self._tokenizer = tokenizer
        check_messages(messages)
        check_tools(tools)
        messages = list(map(_as_templates_expect, messages))
        values = [json_object(call["arguments"])
                  for message in messages for call in calls_of(message)]
        texts: list[str] = []
        _mapped([messages, tools, values], texts.append)
        text = "".join(texts)
        found = [part for part in _first_symbols(tuple(tokenizer.special_tokens)) if part in text]
        # Rare ideographs, as neither case nor Python's repr changes them.
        free = (mark for mark in map(chr, range(*RARE))
                if mark not in text and mark not in source)
        self._swaps = list(zip(found, free, strict=False))
        if len(self._swaps) < len(found):
            raise VicugnaError("every rare ideograph is in use", "messages", "Use fewer")
        self._messages, tools, values = _mapped([messages, tools, values], self._escape)
        self._variables = {"tools": tools, "documents": None, **tokenizer.named_tokens}
        self._render = partial(WORKER.render, source, swaps=self._swaps, arguments=values,
                               date=date and date.isoformat())

    def _escape(self, text: str) -> str:
        for part, mark in self._swaps:
            text = text.replace(part, mark + part[1:])
        return text

    def unescape(self, text: str) -> str:
        """Rendered text with the user-provided text as it was."""
        for part, mark in self._swaps:
            text = text.replace(mark, part[0])
        return text

    def with_placeholders(self, text: str) -> str:
        """Rendered text to be encoded: placeholders for the special tokens of the template, and
        user-provided text unescaped, in which the same names are plain text."""
        return self.unescape(self._tokenizer.encoder.with_placeholders(text))

    def put_reasoning_into_content(self) -> None:
        """Write reasoning as <think>...</think>, tokens where there are such, before the content:
        for a template that has no place for it."""
        for index, message in enumerate(self._messages):
            if not (reasoning := reasoning_of(message)):
                continue
            thought, content = f"{THINK}\n{reasoning}\n{END_THINK}\n\n", message.get("content")
            bare = {key: value for key, value in message.items() if key not in REASONING}
            self._messages[index] = {**bare, "content": (
                [{"type": "text", "text": thought}, *content] if isinstance(content, list) else
                thought + (content or ""))}

    def text(self, prompt: bool = False, count: int | None = None) -> str:
        """The text, still escaped, of the first `count` messages (all by default). VicugnaError
        where the template takes no parts, and would show them as a list of Python."""
        messages = self._messages[:count]
        text = self._render({**self._variables, "messages": messages,
                             "add_generation_prompt": prompt})
        for index, message in enumerate(messages):
            content = message.get("content")
            if content and is_parts(content) and str(content) in text:
                raise VicugnaError("this model's chat template takes text only",
                                   f"messages[{index}]", "Give its content as one text")
        return text

    def starts(self, whole: str) -> Iterator[int]:
        """Where in `whole`, the text of all messages, each assistant message begins: where its
        prompt ends, less what the template ends only prompts with, as <think>."""
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                prompt = self.text(prompt=True, count=index) if index else ""
                start = len(prompt)
                if not whole.startswith(prompt):
                    pairs = enumerate(zip(whole, prompt, strict=False))
                    start = next((n for n, (a, b) in pairs if a != b), len(whole))
                if not index or (start < len(prompt)
                                 and start < len(self.text(count=index))):
                    raise VicugnaError(
                        "this template does not continue the prompt with the assistant's message",
                        f"messages[{index}]", "Begin with a system or user message, and use a "
                        "template that leaves earlier turns unchanged")
                yield start

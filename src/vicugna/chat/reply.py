"""Parsing a reply into reasoning and content, whole or as it streams.

A tokenizer with <think> and </think> among its special tokens marks reasoning by these two tokens:
the same words spelled in text are text. Any other marks it by the words.

* Reasoning opens where the prompt ends with <think>, as some templates write it, or where the reply
  begins with it (after white space), and ends at the next </think>. If there is none, all of the
  reply is reasoning. Newlines beside the marks belong to neither.
* A <think> anywhere else is quoted: it stays content, and so does a </think> after it.
* A </think> *token* that nothing opened makes what precedes it the reasoning, as vLLM's parser of
  DeepSeek-R1 does: models forget to open. Not so where the prompt has closed the reasoning (as
  Qwen3's does when it is switched off), nor the word, which an answer may quote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vicugna.tokenizer import END_THINK, THINK, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class ReplyDelta:
    """What a push adds to a reply."""

    reasoning: str
    content: str


def parse_reply(tokenizer: Tokenizer, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()
                ) -> tuple[str | None, str]:
    """A reply's (reasoning, content), where reasoning is None if the model did not reason, and the
    content is "" if its reasoning never ends. `prompt_ids` are what it replied to."""
    parser = ReplyParser(tokenizer, prompt_ids)
    parser.push(token_ids, last=True)
    return parser.reasoning, parser.content


class ReplyParser:
    """Parses a reply as it streams. `reasoning` (None for none) and `content` are what it is so
    far, and `in_reasoning` is whether it now ends inside the reasoning; all the same however the
    tokens are shared out among pushes.

    The deltas joined give the same, but for a </think> that nothing opened: what precedes it has
    been given as content by then, so the mark and what follows are given as content as well.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        start, end = tokenizer.id_of(THINK), tokenizer.id_of(END_THINK)
        self._names = {} if start is None or end is None else {start: THINK, end: END_THINK}
        last = _mark_at_end(tokenizer, prompt_ids, self._names)
        self._opened, self._closed = last == THINK, last == END_THINK
        self._eos_ids, self._decoder = tokenizer.eos_ids, StreamDecoder(tokenizer)
        self._marks: list[tuple[str, int, int]] = []  # of tokens: where they are in the text
        self._decoded = 0  # length of all tokens' text
        self._text, self._shown = "", ("", "")
        self.reasoning: str | None = None
        self.content, self.in_reasoning = "", self._opened

    def push(self, token_ids: Sequence[int], text: str | None = None, last: bool = False
             ) -> ReplyDelta:
        """Parse further tokens. `text` is what may be shown by now of them and of those before,
        where a stop string holds back or cuts off some; None is all of their text. After the
        `last` push nothing is held back."""
        decoded = "".join(map(self._decode, token_ids)) + (self._decoder.finish() if last else "")
        self._text += decoded if text is None else text
        before, self._shown = self._shown, self._parse(last)
        return ReplyDelta(*(new[len(old):] for new, old in zip(self._shown, before, strict=True)))

    def _decode(self, id: int) -> str:
        text = "" if id in self._eos_ids else self._decoder.push(id)
        self._decoded += len(text)
        if mark := self._names.get(id):  # which decoding may skip
            start = self._decoded - (len(mark) if text.endswith(mark) else 0)
            self._marks.append((mark, start, self._decoded))
        return text

    def _find(self, mark: str, after: int = 0) -> tuple[int, int, int] | None:
        """Where the next `mark` begins and ends in the text, and after what the next one is to be
        looked for."""
        if not self._names:
            at = self._text.find(mark, after)
            return None if at < 0 else (at, at + len(mark), at + len(mark))
        return next(((begin, end, n) for n, (kind, begin, end) in enumerate(self._marks, 1)
                     if kind == mark and n > after and begin <= len(self._text)), None)

    def _parse(self, last: bool) -> tuple[str, str]:
        """Set what the text so far is; what of it may be shown, which only grows."""
        text, opening = self._text, self._find(THINK)
        closing = self._find(END_THINK) if self._names else None
        unopened = closing and (opening is None or opening[2] > closing[2])
        if opening and not unopened and not text[:opening[0]].strip():
            return self._split(opening[1], opening[2], last)
        # White space, or half a mark, may yet turn out to precede or to be the opening one.
        if not last and not unopened and (
                THINK if not self._names else "").startswith(text.strip()):
            return self._shown
        if self._opened:
            return self._split(0, 0, last)
        if unopened and not self._closed:
            self._split(0, 0, last)
        else:
            self.content = text
        return "", text

    def _split(self, start: int, after: int, last: bool) -> tuple[str, str]:
        """Set reasoning and content, where the reasoning begins at `start`."""
        closing = self._find(END_THINK, after)
        self.in_reasoning = closing is None
        if closing is None:
            reasoning, self.content = self._text[start:], ""
            if not last and not self._names:  # half a mark at the end
                reasoning = reasoning[:len(reasoning) - max(
                    n for n in range(len(END_THINK)) if reasoning.endswith(END_THINK[:n]))]
        else:
            reasoning = self._text[start:closing[0]]
            self.content = self._text[closing[1]:].lstrip("\n")
        self.reasoning = reasoning.strip("\n")
        return self.reasoning, self.content


def _mark_at_end(tokenizer: Tokenizer, prompt_ids: Sequence[int], names: dict[int, str]
                 ) -> str | None:
    """The mark that a prompt ends with, white space aside, if any."""
    tail = prompt_ids[-16:]
    if not names:
        text = tokenizer.decode(tail, skip_special=False).rstrip()
        return next((mark for mark in (THINK, END_THINK) if text.endswith(mark)), None)
    written = (id for id in reversed(tail) if tokenizer.decode([id], skip_special=False).strip())
    return names.get(next(written, -1))

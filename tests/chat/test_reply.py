"""Replies: what is reasoning and what is content, whole and in every way to stream them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna.chat import ReplyParser, parse_reply
from vicugna.tokenizer import Tokenizer

T, E = "<think>", "</think>"  # in these tests the tokens of the tokenizer, if it has them
PIECES = [T, E, "<", "/", "think>", "</th", "\n", " ", "a", "é", "漢", "<thi", "steps", "42"]


@pytest.fixture(scope="session")
def words(tok: Tokenizer) -> Tokenizer:
    """A tokenizer like `tok` that has no tokens for reasoning."""
    content = json.loads(tok.json)
    content["added_tokens"] = [token for token in content["added_tokens"]
                               if token["content"] not in (T, E)]
    return Tokenizer.of(json.dumps(content), tok.config, tok.template)


@pytest.fixture(scope="session")
def hidden(tok: Tokenizer) -> Tokenizer:
    """A tokenizer like `tok` whose tokens for reasoning are not shown in text."""
    content = json.loads(tok.json)
    for token in content["added_tokens"]:
        token["special"] = True
    return Tokenizer.of(json.dumps(content), tok.config, tok.template)


def ids(tok: Tokenizer, *pieces: str) -> list[int]:
    """Tokens of texts, and of the marks where they are tokens."""
    known = [(tok.id_of(piece), piece) for piece in pieces]
    return [id for one, piece in known for id in (tok.encode(piece) if one is None else [one])]


def streamed(tok: Tokenizer, reply: list[int], prompt: list[int], cuts: list[int]
             ) -> tuple[ReplyParser, str, str]:
    """The parser after a stream in deltas that end at `cuts`, and the deltas joined."""
    parser, reasoning, content, done = ReplyParser(tok, prompt), "", "", 0
    for cut in [*sorted(cuts), len(reply)]:
        delta = parser.push(reply[done:cut])
        reasoning, content, done = reasoning + delta.reasoning, content + delta.content, cut
    delta = parser.push([], last=True)
    return parser, reasoning + delta.reasoning, content + delta.content


CASES: list[tuple[list[str], str | None, str]] = [
    (["just an answer"], None, "just an answer"),
    ([T, "a b", E, "c"], "a b", "c"),
    (["\n", T, "\na\n\nb\n", E, "\n\nc\n"], "a\n\nb", "c\n"),
    ([T, "never ends <"], "never ends <", ""), ([T, "never ends\n"], "never ends", ""),
    ([T, E], "", ""), ([T], "", ""), ([], None, ""), ([" \n"], None, " \n"),
    ([T, "a", E, "say ", E, " to end"], "a", f"say {E} to end"),
    ([T, "a", E, "b", T, "c", E, "d"], "a", f"b{T}c{E}d"),
    ([T, T, "a", E, "b"], f"{T}a", "b"),
    # Quoted in the middle of an answer: nothing is lost.
    (["Write ", T, " and ", E, " around it."], None, f"Write {T} and {E} around it."),
    (["The tag ", T, " opens."], None, f"The tag {T} opens."),
]


@pytest.mark.parametrize(("pieces", "reasoning", "content"), CASES)
@pytest.mark.parametrize("kind", ["tok", "words"])
def test_reasoning_and_content(kind: str, pieces: list[str], reasoning: str | None, content: str,
                               request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(kind)
    reply = ids(tok, *pieces)
    assert parse_reply(tok, reply) == parse_reply(tok, [*reply, tok.eos_ids[1]])
    assert parse_reply(tok, reply) == (reasoning, content)
    _, *joined = streamed(tok, reply, [], list(range(len(reply))))
    assert joined == [reasoning or "", content]


def test_what_nothing_opened(tok: Tokenizer, words: Tokenizer) -> None:
    """A token that nothing opened ends reasoning; the word may be quoted."""
    reply = ids(tok, "steps", E, "\n42")
    assert parse_reply(tok, reply) == ("steps", "42")
    parser, reasoning, content = streamed(tok, reply, [], list(range(len(reply))))
    assert (parser.reasoning, parser.content, parser.in_reasoning) == ("steps", "42", False)
    assert (reasoning, content) == ("", f"steps{E}\n42")  # as it had to be given
    assert parse_reply(words, ids(words, "steps", E, "42")) == (None, f"steps{E}42")
    # The same words that are no tokens, of a tokenizer that has such tokens, are text.
    assert parse_reply(tok, tok.encode(f"{T}a{E}b")) == (None, f"{T}a{E}b")


@pytest.mark.parametrize("kind", ["tok", "words", "hidden"])
def test_a_prompt_that_opens_or_closes_the_reasoning(kind: str, request: pytest.FixtureRequest
                                                     ) -> None:
    tok = request.getfixturevalue(kind)
    for end in ("", "\n", "\n\n"):
        opened = ids(tok, "hi ", T, end) if end else ids(tok, "hi ", T)
        assert ReplyParser(tok, opened).in_reasoning
        assert parse_reply(tok, ids(tok, "\na\n", E, "\nb"), opened) == ("a", "b")
        assert parse_reply(tok, ids(tok, T, "a", E, "b"), opened) == ("a", "b")
        assert parse_reply(tok, ids(tok, "a"), opened) == ("a", "")
        assert parse_reply(tok, [], opened) == ("", "")
    if kind != "hidden":
        closed = ids(tok, "hi ", T, "\n\n", E, "\n\n")
        assert parse_reply(tok, ids(tok, "say ", E, " then"), closed) == (None, f"say {E} then")
        assert parse_reply(tok, ids(tok, T, "a", E, "b"), closed) == ("a", "b")


def test_marks_that_decoding_skips(hidden: Tokenizer) -> None:
    for pieces, due in (([T, "a", E, "b"], ("a", "b")), (["a", E, "b"], ("a", "b")),
                        (["\n", T, "\na"], ("a", "")), (["a", T, "b"], (None, "ab"))):
        assert parse_reply(hidden, ids(hidden, *pieces)) == due


@given(data=st.data())
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("kind", ["tok", "words", "hidden"])
def test_no_way_to_stream_changes_a_reply(kind: str, data: st.DataObject,
                                          request: pytest.FixtureRequest) -> None:
    tok = request.getfixturevalue(kind)
    pieces = data.draw(st.lists(st.sampled_from(PIECES), max_size=8))
    prompt = ids(tok, *data.draw(st.lists(st.sampled_from([T, E, "\n", "a"]), max_size=3)))
    reply = ids(tok, *pieces)
    cuts = data.draw(st.lists(st.integers(0, len(reply)), max_size=8))
    parser, reasoning, content = streamed(tok, reply, prompt, cuts)
    whole = parse_reply(tok, reply, prompt)
    assert (parser.reasoning, parser.content) == whole
    text = tok.decode(reply)  # which is given as it is where a mark came that nothing had opened
    assert (reasoning, content) == (whole[0] or "", whole[1]) or (
        (reasoning, content) == ("", text) and kind != "words" and E in pieces)
    for part in (T, E, "\n", " "):  # nothing is lost but marks and white space beside them
        text, whole = text.replace(part, ""), tuple((p or "").replace(part, "") for p in whole)
    assert "".join(whole) == text


@given(data=st.data())
@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("kind", ["tok", "words", "hidden"])
def test_text_that_a_stop_string_holds_back(kind: str, data: st.DataObject,
                                            request: pytest.FixtureRequest) -> None:
    """The engine's text may lag behind its tokens, and may be cut off at the end."""
    tok = request.getfixturevalue(kind)
    reply = ids(tok, *data.draw(st.lists(st.sampled_from(PIECES), max_size=8)))
    parser, text, done = ReplyParser(tok), tok.decode(reply), 0
    for n, id in enumerate(reply):
        whole = len(tok.decode(reply[:n + 1]).rstrip("\ufffd"))
        now = max(done, whole - data.draw(st.integers(0, 9)))
        parser.push([id], text[done:now])
        done = now
    parser.push([], text[done:], last=True)
    assert (parser.reasoning, parser.content) == parse_reply(tok, reply)


def test_a_stop_string_cuts_the_text(tok: Tokenizer) -> None:
    reply = ids(tok, T, "a", E, "one STOP")
    for text, due in (("<think>a</think>one ", ("a", "one ")), ("<think>", ("", "")),
                      ("<think>a</th", ("a", "")), ("<th", ("", ""))):
        parser = ReplyParser(tok)
        parser.push(reply, text, last=True)
        assert (parser.reasoning, parser.content) == due


def test_text_chats_import_neither_images_nor_networks() -> None:
    program = ("import sys, vicugna.chat; "
               "print([name for name in ('PIL', 'torch', 'vicugna.chat.images', 'vicugna.engine',"
               " 'fastapi') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")})
    assert done.stdout.strip() == "[]"

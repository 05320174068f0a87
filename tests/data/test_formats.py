"""Files and rows of every usual form: read as what they are, or refused in clear words."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_sources import CHAT, write

from vicugna import data
from vicugna.data import SourceSpec
from vicugna.data.records import Chat, Text
from vicugna.data.sources import documents
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

ROWS = [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    """CSV of rows, in which lists are JSON text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*dict.fromkeys(key for row in rows for key in row)],
                            delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: value if isinstance(value, str) else json.dumps(value)
                      for key, value in row.items()} for row in rows)
    return out.getvalue()


FORMS: dict[str, str] = {
    "a.json": json.dumps(ROWS, indent=2), "b.json": "\n".join(map(json.dumps, ROWS)),
    "c.JSON": json.dumps(ROWS),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)), "b.JSONL": "\n".join(map(json.dumps, ROWS)),
    "c.NdJson": "\n".join(map(json.dumps, ROWS)), "d.jsonlines": "\n".join(map(json.dumps, ROWS)),
    "a.csv": table(ROWS), "b.CSV": table(ROWS, ";"),
    "a.tsv": table(ROWS, "\t")}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_rows_gives_the_same_chats(name: str, packed: str) -> None:
    path = write(name + packed.upper() * name.isupper() + packed,
                 PACKERS[packed](FORMS[name].encode()))
    found = [one for one in documents(SourceSpec(source=path)) if isinstance(one, Chat)]
    assert [one.messages for one in found] == [row["messages"] for row in ROWS]
    assert all(one.where.startswith(path) for one in found)
    assert found[1].where.split()[-1] in ("2", "3")


@pytest.mark.parametrize("packed", PACKERS)
def test_compressed_plain_text(packed: str) -> None:
    path = write(f"a.txt{packed}", PACKERS[packed](b"one\ntwo\n" * 5000))
    assert list(documents(SourceSpec(source=path))) == [Text("one\ntwo\n" * 5000)]


CALLS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"},
         {"from": "gpt", "value": "hello"}]
DUE = [{"role": "system", "content": "Be brief."}, *CHAT]


@pytest.mark.parametrize(("row", "due"), [
    ({"conversations": CALLS}, DUE), ({"conversations": CALLS[1:], "system": "Be brief."}, DUE),
    ({"conversations": CHAT}, CHAT), ({"conversation": CALLS[1:]}, CHAT),
    ({"messages": json.dumps(CHAT)}, CHAT), ({"messages": list(map(json.dumps, CHAT))}, CHAT),
    ({"messages": CHAT, "text": None}, CHAT), ({"messages": CHAT, "system": "Be brief."}, DUE),
    ({"instruction": "hi", "input": "", "output": "hello"}, CHAT),
    ({"instruction": "hi", "input": "there", "output": "hello"},
     [{"role": "user", "content": "hi\n\nthere"}, CHAT[1]]),
    ({"instruction": "hi", "output": "hello", "system": "Be brief.", "history": []}, DUE),
    ({"prompt": "hi", "completion": "hello"}, CHAT), ({"prompt": "hi", "response": "hello"}, CHAT),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
    ({"question": "hi", "answer": "hello", "id": 3}, CHAT)])
def test_forms_of_chats(row: dict[str, Any], due: Any) -> None:
    [one] = documents(SourceSpec(source=write("a.jsonl", json.dumps(row))))
    assert isinstance(one, Chat) and one.messages == due


def test_a_column_says_which_form_is_meant() -> None:
    path = write("a.jsonl", json.dumps({"text": "x", "messages": CHAT, "talk": CHAT}))
    with pytest.raises(VicugnaError, match="text and messages: ambiguous"):
        list(documents(SourceSpec(source=path)))
    for column, due in (("text", Text("x")), ("messages", Chat(CHAT, None, "a.jsonl line 1")),
                        ("talk", Chat(CHAT, None, "a.jsonl line 1"))):
        assert list(documents(SourceSpec(source=path, column=column))) == [due]


@pytest.mark.parametrize(("name", "content", "where", "what"), [
    ("a.json", "[1]", "a.json item 1", "not a JSON object"),
    ("a.json", '{"data": [{"text": "x"}]}', "a.json item 1", "there are: data"),
    ("a.json", '{"text": {"0": "x"}}', "a.json item 1", "text is dict"),
    ("a.json", "[{},\n{]", "a.json line 2", "not valid JSON"), ("a.json", "", "a.json", "empty"),
    ("a.json", "[" * 100_000, "a.json", "not valid JSON"), ("a.json", "[]", "a.json", "no text"),
    ("a.csv", "id,label\n1,x\n", "a.csv line 2", "there are: id, label"),
    ("a.csv", "text\nx\ny,z\n", "a.csv line 3", "2 fields, but the first line names 1"),
    ("a.csv", 'text\n"x\ny"\n"z" w\n', "a.csv line 4", "not valid CSV"),
    ("a.csv", f"messages\n{[{'role': 'user'}]}\n", "a.csv line 2", "messages is str"),
    ("a.jsonl", '{"prompt": "x", "chosen": "y", "rejected": "z"}', "a.jsonl line 1", "preference"),
    ("a.jsonl", '{"instruction": "x", "output": "y", "history": [["a", "b"]]}', "a.jsonl line 1",
     "history"),
    ("a.jsonl", '{"conversations": [{"from": "alien", "value": "x"}]}',
     "a.jsonl line 1, messages[0]", "role must be one of"),
    ("a.jsonl", '{"conversations": [{"from": "function_call", "value": "{}"}]}',
     "a.jsonl line 1, messages[0]", "function_call"),
    ("a.jsonl", json.dumps({"messages": CHAT, "tools": "add"}), "a.jsonl line 1, tools",
     "tools must be a list"),
    ("a.jsonl", json.dumps({"messages": CHAT, "tools": {"name": "add"}}), "a.jsonl line 1, tools",
     "tools must be a list"),
    ("a.jsonl", json.dumps({"messages": [CHAT[0], {**CALL, "tool_calls": "add(1)"}]}),
     "a.jsonl line 1, messages[1]", "tool_calls must be a list"),
    ("a.jsonl.gz", b"{}", "a.jsonl.gz", "cannot be decompressed"),
    ("a.csv.gz", gzip.compress(b"text\nx\n")[:-12] + b"\xff" * 12, "a.csv.gz",
     "cannot be decompressed"),
    ("a.txt.xz", lzma.compress(b"x" * 999)[:-9], "a.txt.xz", "cannot be decompressed"),
    ("a.csv.zst", b"text\nx\n", "a.csv.zst", "cannot be decompressed"),
    ("a.jsonl.bz2", b"{}" * 99, "a.jsonl.bz2", "cannot be decompressed"),
    *((f"a{suffix}", b"x", f"a{suffix}", "files are not read") for suffix in (
        ".zip", ".tar.gz", ".TGZ", ".arrow", ".xlsx", ".pdf", ".safetensors")),
    ("a.parquet.gz", b"x", "a.parquet.gz", "files are not read"),
    *((f"a{suffix}", json.dumps(ROWS[0]), f"a{suffix}", "it holds JSON") for suffix in (
        "", ".txt", ".jsonl.bak", ".json5")),
    ("a.txt", json.dumps({"id": 1, **ROWS[0]}), "a.txt", "it holds JSON"),
    ("a.gz", gzip.compress(json.dumps(ROWS).encode()), "a.gz", "it holds JSON"),
    ("a.jsonl", json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": "",
     "function_call": {"name": "add", "arguments": "{}"}}]}), "a.jsonl line 1, messages[1]",
     "function_call"),
])
def test_what_is_refused(tok: Tokenizer, name: str, content: str | bytes, where: str, what: str
                         ) -> None:
    write(name, content)
    with pytest.raises(VicugnaError) as caught:
        data.open_stream([name], tok, 8, 0, "cache")
    assert caught.value.where == where and what in caught.value.what
    assert "\n" not in str(caught.value) and caught.value.fix


# Tables: tools, calls and null-filled structures.

def chats(rows: list[dict[str, Any]], kind: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The documents of rows stored in a kind of source."""
    if kind == "hub":
        class Dataset(list[Any]):
            column_names = tuple(rows[0])
            _fingerprint = "f"

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
            load_dataset=lambda name, split: Dataset(pyarrow.Table.from_pylist(rows).to_pylist())))
        return list(documents(SourceSpec(source="hf:org/name")))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    else:
        write(f"a.{kind}", table(rows) if kind == "csv" else "\n".join(map(json.dumps, rows)))
    return list(documents(SourceSpec(source=f"a.{kind}")))


@pytest.mark.parametrize("kind", ["parquet", "hub", "jsonl", "csv"])
@pytest.mark.parametrize("stored", ["lists", "JSON text", "a list of JSON texts"])
def test_tables_keep_tools(kind: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {"lists": TOOLS, "JSON text": json.dumps(TOOLS),
             "a list of JSON texts": list(map(json.dumps, TOOLS))}[stored]
    rows = [{"id": 1, "messages": [CHAT[0], CALL], "tools": tools}] * 2
    first, _ = chats(rows, kind, monkeypatch)
    assert first.tools == TOOLS
    assert first.messages == [CHAT[0], CALL]
    bare = chats([{"messages": CHAT, "tools": tools[:0]}], kind, monkeypatch)
    assert bare[0].tools is None
    null = chats([{"messages": CHAT, "tools": "null"}], kind, monkeypatch)  # of json.dumps(None)
    assert null[0].tools is None


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_fields_that_a_table_filled_with_nulls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}},
             {"function": {"name": "say", "arguments": {"text": "x", "loud": True}}}]
    tools = [{"name": "add", "parameters": {"a": {"type": "integer"}}},
             {"name": "say", "parameters": {"text": {"type": "string", "enum": ["x", "y"]}}}]
    messages = [CHAT[0], {"role": "assistant", "tool_calls": calls}]
    [one] = chats([{"messages": messages, "tools": tools}], kind, monkeypatch)
    assert one.messages == messages and one.tools == tools


def test_a_map_is_an_object() -> None:
    kind = pyarrow.list_(pyarrow.struct([
        ("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(
            pyarrow.struct([("name", pyarrow.string()),
                            ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.int64()))])))]))
    messages = [CHAT[0], {"role": "assistant", "tool_calls": [
        {"name": "add", "arguments": {"a": 1, "b": 2}}]}]
    given = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [
        {"name": "add", "arguments": [("a", 1), ("b", 2)]}]}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([given], kind)}),
                                "a.parquet")
    [one] = documents(SourceSpec(source="a.parquet"))
    assert isinstance(one, Chat) and one.messages == messages


# Training a tokenizer on anything that chats hold.

def test_texts_hold_all_that_is_said() -> None:
    said = [
        {"role": "system", "content": [{"type": "text", "text": "part one"},
                                       {"type": "text", "text": "part two"}]},
        {"role": "user", "content": "asked"},
        {"role": "assistant", "content": None, "reasoning_content": "thought", "tool_calls": [
            {"function": {"name": "add", "arguments": {"é": [1, "x"]}}},
            {"name": "text_call", "arguments": '{"a": 1}'}]},
        {"role": "tool", "content": {"sum": 5}}, {"role": "tool", "content": ["listed", 3]},
        {"role": "assistant", "content": "answered", "thinking": "again"}]
    write("a.jsonl", json.dumps({"messages": said, "tools": TOOLS}))
    texts = list(data.texts(["a.jsonl"], 10_000))
    assert texts == ["part one", "part two", "asked", "thought", "add", '{"é": [1, "x"]}',
                     "text_call", '{"a": 1}', '{"sum": 5}', '"listed"', "3", "again", "answered",
                     json.dumps(TOOLS[0])]


def test_a_stream_says_which_sources_are_plain_text(tok: Tokenizer) -> None:
    write("a.txt", "some words. " * 99)
    write("a.jsonl", json.dumps({"messages": CHAT}))
    stream = data.open_stream(["a.txt", "a.jsonl", "task:reasoning.steps"], tok, 64, 0, "cache")
    assert stream.plain_text == ["a.txt"]

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from vicugna import data
from vicugna.data import sources
from vicugna.data.records import Chat, Text
from vicugna.data.sources import SourceSpec, documents, parse_specs
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def whole(spec: SourceSpec) -> str:
    return "".join(d.text for d in documents(spec) if isinstance(d, Text))


def test_text_and_jsonl() -> None:
    text = "\ufeffone\r\ntwo\n\n  é😀"
    [document] = documents(SourceSpec(source=write("a.txt", text)))
    assert document == Text(text[1:])
    lines = [json.dumps({"text": "one"}), "", json.dumps({"messages": CHAT, "tools": [{}]})]
    one, two = documents(SourceSpec(source=write("a.jsonl", "\n".join(lines))))
    assert one == Text("one") and two == Chat(CHAT, [{}], "a.jsonl line 3")


def test_long_text_is_streamed_in_pieces_without_changing_its_tokens(
        tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 50)
    text = "some words and more.\n\n    then code;\n\n\nx = 1!\n" * 20
    pieces = list(documents(SourceSpec(source=write("a.md", text))))
    assert len(pieces) > 9 and [p.last for p in pieces if isinstance(p, Text)].count(True) == 1
    assert "".join(p.text for p in pieces if isinstance(p, Text)) == text
    ids = [i for p in pieces if isinstance(p, Text) for i in tok.encode(p.text)]
    assert ids == tok.encode(text)


def test_globs_are_sorted_and_skip_empty_files() -> None:
    for name in ("b", "a", "sub/c"):
        write(f"d/{name}.txt", name)
    write("d/empty.txt", "")
    assert whole(SourceSpec(source="d/*.txt")) == "ab"
    assert whole(SourceSpec(source="d/**/*.txt")) == "absub/c"


def test_limit_bytes_ends_the_last_document() -> None:
    spec = SourceSpec(source=write("a.txt", "é" * 10), limit_bytes=5)
    assert list(documents(spec)) == [Text("éé")]
    lines = "\n".join(json.dumps({"text": "1234"}) for _ in range(5))
    spec = SourceSpec(source=write("a.jsonl", lines), limit_bytes=8)
    assert list(documents(spec)) == [Text("1234")] * 2


@pytest.mark.parametrize("column, value", [("text", "one"), ("messages", CHAT)])
def test_parquet(column: str, value: Any) -> None:
    table = pyarrow.table({"id": [1, 2], column: [value, value]})
    pyarrow.parquet.write_table(table, "a.parquet")
    found = list(documents(SourceSpec(source="a.parquet")))
    assert found == list(documents(SourceSpec(source="a.parquet", column=column)))
    assert len(found) == 2 and found[1] == (
        Text("one") if column == "text" else Chat(CHAT, None, "a.parquet row 2"))


def test_stdlib_is_this_pythons_and_without_tests() -> None:
    paths = sources.stdlib_files()
    assert paths == sorted(paths) and any(p.name == "textwrap.py" for p in paths)
    assert not any({"test", "site-packages", "idlelib"} & set(p.parts) for p in paths)
    text = whole(SourceSpec(source="stdlib", limit_bytes=10_000))
    assert 9_000 < len(text.encode()) <= 10_000


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VicugnaError, match=r"pip install 'vicugna\[hub\]'"):
        monkeypatch.setitem(sys.modules, "datasets", None)
        list(documents(SourceSpec(source="hf:org/name")))

    class Dataset(list[dict[str, str]]):
        column_names = ("body",)
        _fingerprint = "f"

    def load_dataset(name: str, split: str) -> Dataset:
        if name != "org/name":
            raise FileNotFoundError("no such data")
        return Dataset([{"body": split}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    spec = SourceSpec(source="hf:org/name", split="dev", column="body")
    assert list(documents(spec)) == [Text("dev")]
    with pytest.raises(VicugnaError, match="no column text or messages"):
        list(documents(SourceSpec(source="hf:org/name")))
    with pytest.raises(VicugnaError, match="no such data"):
        list(documents(SourceSpec(source="hf:org/other")))


@pytest.mark.parametrize("name, content, where, what", [
    ("a.txt", "", "a.txt", "empty"),
    ("a.txt", "x\ny\0", "a.txt line 2", "binary"),
    ("a.txt", "x\n" * 9000 + "\0", "a.txt line 9001", "binary"),
    ("a.txt", b"x\n\xff", "a.txt line 2", "not UTF-8"),
    ("a.txt", "caf\u00e9".encode("latin-1"), "a.txt line 1", "not UTF-8"),
    ("a.jsonl", '{"text": "x"}\n{"text": "y"', "a.jsonl line 2", "not valid JSON: Expecting ','"),
    ("a.jsonl", "[" * 100_000, "a.jsonl line 1", "not valid JSON"),
    ("a.jsonl", '"x"', "a.jsonl line 1", "not a JSON object"),
    ("a.jsonl", '{"test": "x"}', "a.jsonl line 1", 'neither "text" nor "messages"'),
    ("a.jsonl", '{"text": 3}', "a.jsonl line 1", "must be a string"),
    ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl line 1", "surrogate"),
    ("a.jsonl", '{"messages": "x"}', "a.jsonl line 1", "messages a list"),
    ("a.jsonl", '{"text": [{"role": "user"}]}', "a.jsonl line 1", "must be a string"),
    ("a.jsonl", '{"messages": []}', "a.jsonl line 1, messages", "empty"),
    ("a.jsonl", '{"messages": [{"role": "x"}]}', "a.jsonl line 1, messages[0]", "role must be"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl line 1",
     "no assistant message"),
    ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}, *CHAT]}),
     "a.jsonl line 1, messages[0]", "pictures are not taken"),
    ("a.jsonl", "\n\n", "a.jsonl", "no text"),
    ("a.jsonl", json.dumps({"text": "x"}) + "\n" + json.dumps({"messages": CHAT}), "a.jsonl",
     "mixed"),
    ("a.parquet", "PAR1 not really", "a.parquet", "not a readable Parquet"),
])
def test_bad_files_are_named_with_their_line(tok: Tokenizer, tmp_path: Path, name: str,
                                             content: str | bytes, where: str, what: str) -> None:
    write(name, content)
    with pytest.raises(VicugnaError) as caught:
        data.open_stream([name], tok, 8, 0, "cache")
    assert caught.value.where == where and what in caught.value.what
    assert "\n" not in str(caught.value)
    assert not [path for path in Path("cache").glob("*/*") if path.name != "lock"]


def test_parquet_without_the_column_lists_the_columns() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), "a.parquet")
    with pytest.raises(VicugnaError, match=r"no column text or messages \(there are: id\)"):
        list(documents(SourceSpec(source="a.parquet")))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), "a.parquet")
    with pytest.raises(VicugnaError, match="row 1: text must be a string and"):
        list(documents(SourceSpec(source="a.parquet")))


@pytest.mark.parametrize("spec, message", [
    ("stdlb", "Did you mean 'stdlib'"), ("mine.jsnl", "Did you mean 'mine.jsonl'"),
    ("taks:reasoning.steps", "Did you mean 'task:reasoning.steps'"),
    ("task:reasoning.step", "Did you mean 'reasoning.steps'"),
    ("nowhere/*.txt", "no file matches"), ("folder", "this is a folder"),
    ("quite/another/thing.txt", "no such file or source"),
])
def test_unknown_sources_name_the_nearest(tok: Tokenizer, spec: str, message: str) -> None:
    Path("folder").mkdir()
    write("mine.jsonl", "{}")
    with pytest.raises(VicugnaError, match=message):
        data.open_stream([spec], tok, 8, 0, "cache")


@pytest.mark.parametrize("spec, message", [
    ({"source": "stdlib", "wieght": 1}, "data.sources[0].wieght: extra inputs are not permitted"),
    ({"source": "stdlib", "weight": 0}, "data.sources[0].weight: input should be greater than 0"),
    ({"source": "stdlib", "weight": -1}, "greater than 0"),
    ({"source": "stdlib", "weight": "much"}, "valid number"),
    ({"weight": 1}, "data.sources[0].source: field required"), (5, "data.sources[0]"),
    ({"source": "task:reasoning.steps", "difficulty": {"deep": 1}}, 'unknown key "deep"'),
    ({"source": "task:reasoning.steps", "difficulty": {"depth": [1]}}, "difficulty"),
    ({"source": "stdlib", "form": "text"}, "task: sources only"),
])
def test_bad_specs(spec: Any, message: str) -> None:
    with pytest.raises(VicugnaError) as caught:
        parse_specs([spec])
    assert message in str(caught.value)


def test_specs_must_be_a_list() -> None:
    for bad in ([], "stdlib", None):
        with pytest.raises(VicugnaError, match="not a list"):
            parse_specs(bad)  # type: ignore[arg-type]


def test_texts_follow_the_weights() -> None:
    write("a.txt", "a" * 9000)
    write("b.jsonl", "\n".join(json.dumps({"messages": CHAT}) for _ in range(2000)))
    every = list(data.texts(["a.txt", {"source": "b.jsonl", "weight": 3},
                             {"source": "task:reasoning.steps", "weight": 4}], 8000))
    letters = sum(len(t) for t in every if t[0] == "a")
    chats = sum(len(t) for t in every if t in ("hi", "hello"))
    assert abs(letters - 1000) < 10 and abs(chats - 3000) < 10
    assert abs(sum(map(len, every)) - 8000) < 500

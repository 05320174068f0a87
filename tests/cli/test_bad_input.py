"""Bad input: one clean line with what, where and the fix; exit 2; nothing half-written."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import RECIPE

BASE: dict[str, Any] = {"model": {"depth": 1, "width": 16, "heads": 2, "context": 256},
        "stages": [{"kind": "tokenizer", "vocab_size": 300, "bytes_per_source": 20000},
                   {"kind": "pretrain", "steps": 1, "rows": 1, "sequence_length": 64,
                    "precision": "fp32", "validation_rows": 0}]}


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Write a recipe over one source, with dotted settings; gives the arguments that run it."""
    def write(source: object, *settings: str) -> list[str]:
        values = copy.deepcopy(BASE) | {"data": {"sources": [source]}}
        values["stages"][1]["sources"] = [source]
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        chosen = [part for setting in settings for part in ("--set", setting)]
        return ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs" / "r"), *chosen]
    return write


@pytest.mark.parametrize(("setting", "expected"), [
    ("stages.pretrain.stepz=5", ["stages.pretrain.stepz", "Did you mean 'steps'?"]),
    ("modle.depth=5", ["modle", "Did you mean 'model'?"]),
    ("stages.pretrain.optimiser.learning_rat=1", ["learning_rat", "Did you mean 'learning_rate'?"]),
    ("stages.pretrain.sources=[{source: stdlib, wieght: 2}]", ["wieght", "Did you mean 'weight'?"]),
    ("stages.pretrain.steps=many", ["stages.pretrain.steps", "integer"]),
    ("stages.pretrain.steps=0", ["stages.pretrain.steps", "greater than or equal to 1"]),
    ("stages.pretrain.precision=fp8", ["stages.pretrain.precision", "bf16"]),
    ("model.width=[3]", ["model.width", "integer"]),
    ("model=3", ["model", "ModelSpec"]),
    ("stages.pretrain.steps.more=5", ["steps in stages.pretrain.steps.more has no keys below it"]),
    ("stages.pretrain.steps", ["not of the form key=value"]),
    ("stages.pretrain.steps=[", ["not valid YAML"]),
    ("model.heads=3", ["width 16 is not divisible by heads 3"]),
    ("model.heads=16", ["head_dim 1 is odd"]),
    ("model.kv_heads=3", ["not a multiple of num_key_value_heads 3"]),
    ("model.experts=1", ["num_experts_per_tok"]),
    ("stages.pretrain.sequence_length=512", ["sequences of 512 tokens", "context holds 256"]),
    ("stages.pretrain.rows=100000000000", ["GiB", "micro_rows"]),
    ("model.width=500000", ["a network of", "Lower model.depth or model.width"]),
    ("data.sources=[]", ["data.sources"]),
    ("data.sources=['task:reasoning.stepz']", ["reasoning.steps"]),
])
def test_recipe(setting: str, expected: list[str], recipe: Any, cli: Any) -> None:
    ended = cli(*recipe({"source": "stdlib", "limit_bytes": 60000}), "--set", setting)
    assert ended.code == 2
    for word in expected:
        assert word in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err and ended.out == ""


@pytest.mark.parametrize(("content", "expected"), [
    (None, "no such file"), (b"", "no keys"), (b"\xff\xfe", "not UTF-8"), (b"a: [", "not valid"),
    (b"- 1", "no keys")])
def test_recipe_file(content: bytes | None, expected: str, tmp_path: Path, cli: Any) -> None:
    if content is not None:
        (tmp_path / "r.yaml").write_bytes(content)
    ended = cli("run", tmp_path / "r.yaml", "--out", tmp_path / "runs" / "r")
    assert ended.code == 2 and expected in ended.line and "r.yaml" in ended.line
    assert not (tmp_path / "runs").exists()


GOOD = b'{"text": "Snow fell on the barn and the dog slept."}\n'


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("gone.txt", None, ["no such file"]),
    ("empty.txt", b"", ["empty"]),
    ("blank.jsonl", b"\n\n", ["no text"]),
    ("binary.txt", b"ab\ncd\0\1\2", ["line 2", "binary"]),
    ("latin.txt", b"ok\ncaf\xe9\n", ["line 2", "UTF-8"]),
    ("bad.jsonl", GOOD + b'{"text": "a",}\n', ["line 2", "not valid JSON"]),
    ("list.jsonl", GOOD + b"[1]\n", ["line 2", "not a JSON object"]),
    ("keys.jsonl", GOOD + b'{"txt": "a"}\n', ["line 2", "text"]),
    ("chat.jsonl", b'{"messages": [{"role": "usr", "content": "a"}]}\n', ["line 1", "role"]),
    ("bad.parquet", b"PAR1 no", ["Parquet"]),
    ("short.txt", b"Snow fell. Rain.", ["too few|fewer"]),
])
def test_data(name: str, content: bytes | None, expected: list[str], recipe: Any, tmp_path: Path,
              cli: Any) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = cli(*recipe(str(tmp_path / name)))
    assert ended.code == 2
    for word in expected:
        assert any(one in ended.line for one in word.split("|")), ended.line
    left = [p for p in (tmp_path / "runs").rglob("*") if p.name.endswith((".tmp", ".old"))]
    assert not left and not list((tmp_path / "runs").rglob("stage.json"))


def test_a_corpus_shorter_than_a_sequence(recipe: Any, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "a.txt").write_text("Snow fell on the old barn; 12 dogs slept in it. " * 8)
    ended = cli(*recipe(str(tmp_path / "a.txt"), "stages.tokenizer.vocab_size=300",
                        "stages.tokenizer.bytes_per_source=99999", "model.context=9000",
                        "data.sources=[stdlib]", "stages.pretrain.sequence_length=8000"))
    assert ended.code == 2 and "fewer than one sequence (8000 + 1)" in ended.err.splitlines()[-1]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "02-pretrain" / "checkpoint", tmp_path / "model"))


def edit(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v != "gone"}
    (model / "config.json").write_text(json.dumps(config))


def corrupt(model: Path, how: str) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(content[:-100])
    elif how == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 62) + content[8:])
    elif how == "shape":
        edit(model, intermediate_size=999)
    elif how == "keys":
        edit(model, hidden_size="gone")
    elif how == "type":
        edit(model, hidden_size="wide")
    elif how == "kind":
        edit(model, model_type="lama")
    elif how == "pickle":
        weights.unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    elif how == "none":
        weights.unlink()
    elif how == "config":
        (model / "config.json").write_text("{")


@pytest.mark.parametrize(("how", "expected"), [
    ("truncated", "model.safetensors"), ("header", "header"), ("shape", "wrong shape"),
    ("keys", "missing hidden_size"), ("type", "hidden_size is 'wide'"), ("kind", "'llama'"),
    ("pickle", "refused: only safetensors"), ("none", "model.safetensors"),
    ("config", "not valid JSON")])
@pytest.mark.parametrize("verb", ["info", "chat"])
def test_checkpoint(how: str, expected: str, verb: str, model: Path, cli: Any) -> None:
    corrupt(model, how)
    ended = cli(verb, model, *(["--once", "Hi"] if verb == "chat" else []))
    assert ended.code == 2 and expected in ended.line


def test_a_start_that_is_no_checkpoint(recipe: Any, model: Path, cli: Any) -> None:
    corrupt(model, "truncated")
    ended = cli(*recipe("stdlib", f"model.start={model}", "stages.tokenizer=null"))
    assert ended.code == 2 and "model.safetensors" in ended.err.splitlines()[-1]


def test_a_prompt_longer_than_the_context(model: Path, cli: Any) -> None:
    ended = cli("chat", model, "--once", "word and " * 3000)
    assert ended.code == 2 and "2,048" in ended.line.replace("2048", "2,048")


def test_a_port_in_use(model: Path, cli: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = cli("serve", model, "--port", port)
    assert ended.code == 2 and str(port) in ended.line and "in use" in ended.line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(code: int, recipe: Any, tmp_path: Path, cli: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, so the refusal is put into the system call."""
    real = os.mkdir

    def mkdir(path: Any, *rest: Any, **how: Any) -> None:
        if "runs" in Path(path).parts:
            raise OSError(code, os.strerror(code), str(path))
        real(path, *rest, **how)

    monkeypatch.setattr(os, "mkdir", mkdir)
    ended = cli(*recipe("stdlib"))
    assert ended.code == 2 and "runs" in ended.line
    assert "disk is full" in ended.line or "no permission" in ended.line


def test_a_file_where_the_run_should_be(recipe: Any, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").write_text("mine")
    ended = cli(*recipe("stdlib"))
    assert ended.code == 2 and "runs/r" in ended.line
    assert (tmp_path / "runs" / "r").read_text() == "mine"


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    import vicugna.run

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(vicugna.run, "run_recipe", broken)
    ended = cli("run", RECIPE)
    assert ended.code == 2
    assert "unexpected ZeroDivisionError: by zero" in ended.line and "--debug" in ended.line

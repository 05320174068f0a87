"""`vicugna convert`: what it writes, what it refuses, and that nothing else is touched."""

from __future__ import annotations

import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from vicugna import checkpoint, models
from vicugna.checkpoint.gguf import writer
from vicugna.checkpoint.stored import Mapped

LLAMA = {"model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64,
         "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}


def write(folder: Path, dtype: torch.dtype = torch.float32, values: torch.dtype = torch.float32,
          **changes: Any) -> Path:
    """A checkpoint in `dtype` whose values `values` holds exactly."""
    network = models.build(LLAMA | changes)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter).to(values))
    checkpoint.Checkpoint(network.to(dtype)).save(folder)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "a")


def test_there_and_back(a: Path, tmp_path: Path, cli: Any) -> None:
    ended = cli("convert", a, tmp_path / "m.gguf", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {
        "source": str(a), "target": str(tmp_path / "m.gguf"), "form": "gguf", "dtype": "as stored",
        "tensors": 30, "lost": []}
    ended = cli("convert", tmp_path / "m.gguf", tmp_path / "b")
    assert ended.code == 0 and ended.err == f"Wrote 30 tensors to {tmp_path / 'b'}\n"
    assert listing(tmp_path / "b") == listing(a)


def test_the_other_verbs_read_gguf(a: Path, tmp_path: Path, cli: Any) -> None:
    write(tmp_path / "b", torch.bfloat16)
    assert cli("convert", tmp_path / "b", tmp_path / "m.gguf").code == 0
    facts, same = (json.loads(cli("info", tmp_path / name, "--json").out)
                   for name in ("m.gguf", "b"))
    assert facts["digest"] == same["digest"] and facts["model_type"] == "llama"


def test_the_format_is_given_by_to_too(a: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("convert", a, tmp_path / "m.bin", "--to", "gguf").code == 0
    assert (tmp_path / "m.bin").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("target", ["b", "m.gguf"])
def test_rounding_needs_lossy(a: Path, tmp_path: Path, cli: Any, target: str) -> None:
    ended = cli("convert", a, tmp_path / target, "--dtype", "bfloat16")
    assert ended.code == 1
    for words in ("would lose precision", "of 3,168 values of ", "weight would change", "--lossy"):
        assert words in ended.line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # nothing is left over
    ended = cli("convert", a, tmp_path / target, "--dtype", "bfloat16", "--lossy", "--json")
    lost, = json.loads(ended.out)["lost"]
    assert "values of" in lost and lost.endswith("rounded to bfloat16")
    read = checkpoint.named_tensors(checkpoint.read(tmp_path / target).network)
    for name, tensor in checkpoint.named_tensors(checkpoint.read(a).network).items():
        kept = target == "m.gguf" and tensor.dim() == 1  # GGUF's norms are F32 in every file
        assert torch.equal(read[name], tensor if kept else tensor.bfloat16().float())


@pytest.mark.parametrize("target", ["b", "m.gguf"])
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_the_same_values_need_no_lossy(tmp_path: Path, cli: Any, target: str, narrow: str) -> None:
    dtype = getattr(torch, narrow)
    write(tmp_path / "a", values=dtype)
    assert cli("convert", tmp_path / "a", tmp_path / target, "--dtype", narrow).code == 0
    read = checkpoint.read(tmp_path / target, None)
    wide = checkpoint.named_tensors(checkpoint.read(tmp_path / "a").network)
    for name, tensor in checkpoint.named_tensors(read.network).items():
        assert tensor.dtype == dtype and torch.equal(tensor.float(), wide[name])
    assert cli("convert", tmp_path / target, tmp_path / "c", "--dtype", "float32").code == 0
    again = checkpoint.read(tmp_path / "c", None)
    assert again.digest == checkpoint.read(tmp_path / "a").digest


def test_values_too_large_are_never_written(tmp_path: Path, cli: Any) -> None:
    write(tmp_path / "a")
    network = checkpoint.read(tmp_path / "a").network
    network.get_parameter("model.norm.weight").data[3] = 1e6
    checkpoint.Checkpoint(network).save(tmp_path / "a")
    ended = cli("convert", tmp_path / "a", tmp_path / "b", "--dtype", "float16", "--lossy")
    assert ended.code == 2 and "model.norm.weight has values that are too large" in ended.line
    assert not (tmp_path / "b").exists()


def test_quantisation_is_reported_as_a_loss(a: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("convert", a, tmp_path / "m.gguf", "--dtype", "q8_0").code == 1
    ended = cli("convert", a, tmp_path / "m.gguf", "--dtype", "q8_0", "--lossy")
    assert ended.code == 0
    assert "Lost precision: q8_0 rounds the weights in blocks of 32" in ended.err


def test_a_folder_with_other_things_stays_as_it_is(a: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    ended = cli("convert", a, tmp_path / "b")
    assert ended.code == 2 and "thesis.txt" in ended.line
    assert listing(tmp_path / "b") == {"thesis.txt": b"mine"}
    ended = cli("convert", a, tmp_path / "b" / "thesis.txt", "--to", "gguf")
    assert ended.code == 2 and "another kind" in ended.line
    assert listing(tmp_path / "b") == {"thesis.txt": b"mine"}
    ended = cli("convert", a, tmp_path / "b", "--to", "gguf")
    assert ended.code == 2 and "a folder stands" in ended.line


@pytest.mark.parametrize("name", ["package.json", "adapter_model.safetensors", "my.model"])
def test_what_only_looks_like_a_checkpoint_is_not_replaced(a: Path, tmp_path: Path, cli: Any,
                                                           name: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).write_text("mine")
    ended = cli("convert", a, tmp_path / "b")
    assert ended.code == 2 and name in ended.line
    assert listing(tmp_path / "b") == {name: b"mine"}


def test_the_ending_may_be_in_capitals(a: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("convert", a, tmp_path / "m.GGUF").code == 0
    assert (tmp_path / "m.GGUF").is_file() and cli("info", tmp_path / "m.GGUF").code == 0


def test_a_pipe_is_not_replaced(a: Path, tmp_path: Path, cli: Any) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    ended = cli("convert", a, tmp_path / "m.gguf")
    assert ended.code == 2 and "another kind" in ended.line


@pytest.mark.parametrize("target", ["b", "m.gguf"])
def test_what_a_killed_conversion_left_is_removed(a: Path, tmp_path: Path, cli: Any,
                                                  target: str) -> None:
    (tmp_path / f".{target}.a1b2c3_4.tmp").write_bytes(b"half")
    assert cli("convert", a, tmp_path / target).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", target]


def test_a_full_disk_under_numpy(a: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
                                 ) -> None:
    def write(*_: Any) -> None:
        raise OSError("8192 requested and 416 written")  # with no number, as NumPy does

    monkeypatch.setattr(writer, "write", write)
    ended = cli("convert", a, tmp_path / "m.gguf")
    assert ended.code == 2 and "could not be written whole" in ended.line
    assert not (tmp_path / "m.gguf").exists()


def test_an_older_checkpoint_is_replaced(a: Path, tmp_path: Path, cli: Any) -> None:
    write(tmp_path / "old", num_hidden_layers=1)
    assert cli("convert", a, tmp_path / "old").code == 0
    assert listing(tmp_path / "old") == listing(a)
    for _ in range(2):
        assert cli("convert", a, tmp_path / "m.gguf").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m.gguf", "old"]


@pytest.mark.parametrize("target", [".", "..", "../link"])
def test_what_is_read_is_not_replaced(a: Path, cli: Any, target: str) -> None:
    (a.parent / "link").symlink_to("a")
    before = listing(a)
    ended = cli("convert", a, a / target)
    assert ended.code == 2 and "would replace the checkpoint that is read" in ended.line
    assert listing(a) == before


def test_new_files_beside_the_weights(a: Path, cli: Any) -> None:
    """Where llama.cpp's own converter writes by default."""
    digest = checkpoint.read(a).digest
    for _ in range(2):  # the second time in place of the first one's file
        assert cli("convert", a, a / "m-f32.gguf").code == 0
        assert cli("convert", a, a / "deeper" / "b").code == 0
    assert {checkpoint.read(path).digest for path in (a, a / "m-f32.gguf", a / "deeper" / "b")
            } == {digest}
    assert cli("convert", a / "m-f32.gguf", a / "n.gguf", "--dtype", "bfloat16", "--lossy"
               ).code == 0
    for name in ("m.gguf", "../x/m.gguf"):
        assert cli("convert", a / "m-f32.gguf", a / name).code == 0
    assert checkpoint.read(a.parent / "x" / "m.gguf").digest == digest


def test_a_gguf_file_is_not_written_over_itself(a: Path, tmp_path: Path, cli: Any) -> None:
    """By whatever path: a link, a hard link, another way to it, the Hub's cache; nor is the folder
    that holds it replaced."""
    blob = tmp_path / "models--o--n" / "blobs" / "abc"
    place = tmp_path / "models--o--n" / "snapshots" / "1"
    blob.parent.mkdir(parents=True)
    place.mkdir(parents=True)
    assert cli("convert", a, blob, "--to", "gguf").code == 0
    (place / "m.gguf").symlink_to("../../blobs/abc")
    (tmp_path / "other").symlink_to(place)
    os.link(blob, tmp_path / "hard.gguf")
    before = blob.read_bytes()
    for source in (place / "m.gguf", place):
        for target in (place / "m.gguf", blob, tmp_path / "other" / "m.gguf",
                       place / ".." / "1" / "m.gguf", tmp_path / "hard.gguf"):
            ended = cli("convert", source, target, "--to", "gguf")
            assert ended.code == 2 and "would replace the checkpoint that is read" in ended.line
    ended = cli("convert", blob, blob.parent)
    assert ended.code == 2 and "would replace the checkpoint that is read" in ended.line
    assert blob.read_bytes() == before and (place / "m.gguf").is_symlink()
    assert cli("convert", place, place / "b").code == 0


@pytest.mark.parametrize(("arguments", "says"), [
    (["a", "b", "--to", "zip"], "unknown format 'zip'"),
    (["a", "b", "--dtype", "q8_0"], "'q8_0' is not a dtype of hf files"),
    (["a", "m.gguf", "--dtype", "int3"], "'int3' is not a dtype of gguf files"),
    (["gone", "b"], "no such file or folder"),
    (["gone.gguf", "b"], "gone.gguf"),
    (["vicugna", "m.gguf", "--lossy"], "our own architecture cannot be represented"),
])
def test_wrong_input(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch,
                     arguments: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(Path("a"))
    write(Path("vicugna"), model_type="vicugna", head_dim=8, sliding_window=8)
    ended = cli("convert", *arguments)
    assert ended.code == 2 and says in ended.line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "vicugna"]


def test_weights_that_do_not_fit_are_not_converted(a: Path, tmp_path: Path, cli: Any) -> None:
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    for target in ("b", "m.gguf"):
        ended = cli("convert", a, tmp_path / target)
        assert ended.code == 2 and "wrong shape" in ended.line


def test_without_the_package(a: Path, tmp_path: Path, cli: Any,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    ended = cli("convert", a, tmp_path / "m.gguf")
    assert ended.code == 2 and "pip install 'vicugna[gguf]'" in ended.line
    assert cli("convert", a, tmp_path / "b").code == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_memory_holds_one_tensor_at_a_time(a: Path, tmp_path: Path, cli: Any, dtype: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = [0], Mapped.read

    def counted(self: Mapped, *arguments: Any) -> torch.Tensor:
        most[0] = max(most[0], len(alive))
        tensor = read(self, *arguments)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(Mapped, "read", counted)
    for target in ("m.gguf", *(["b"] if dtype == "bfloat16" else [])):
        assert cli("convert", a, tmp_path / target, "--dtype", dtype, "--lossy").code == 0
    assert most[0] <= 1

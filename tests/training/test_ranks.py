"""Two gloo processes train as one does, resume as themselves or as one, and never hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def processes(count: int, folder: Path, what: str = "all") -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.run(
        [sys.executable, *(start if count > 1 else []), HERE / "two_ranks.py", folder, what],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    for count, name in ((1, "one"), (2, "two")):
        done = processes(count, made / name)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    return made


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "untied", "rl"])
def test_two_processes_have_the_losses_of_one(mode: str, folder: Path) -> None:
    one, two = figures(folder / "one" / mode), figures(folder / "two" / mode)
    near = 2e-2 if mode == "untied" else 2e-3  # bf16, float32
    assert len(one) == len(two) > 0
    if mode == "rl":  # a last bit of the weights may change which token is drawn, later or sooner
        one, two = one[:1], two[:1]
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"] and a["skipped"] == b["skipped"] == 0
        assert a["loss"] == pytest.approx(b["loss"], abs=near)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=20 * near)
        for key in ("validation_loss", "reward"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=near)
        if mode != "rl":
            assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_resume_bit_by_bit(mode: str, folder: Path) -> None:
    expected, killed = folder / "two" / mode, folder / "two" / f"{mode}-killed"
    assert (expected / "digest-0.json").read_text() == (killed / "digest-0.json").read_text()
    assert [row["loss"] for row in figures(expected)] == [row["loss"] for row in figures(killed)]


def test_one_process_goes_on_from_two(folder: Path) -> None:
    assert processes(1, folder / "two", "resume").returncode == 0
    expected, one = figures(folder / "two" / "fsdp"), figures(folder / "two" / "fsdp-one")
    assert [row["step"] for row in one] == list(range(8))
    losses = [row["loss"] for row in expected]
    assert [row["loss"] for row in one] == pytest.approx(losses, abs=2e-3)


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    done = processes(2, tmp_path, "fail")
    assert done.returncode != 0 and "this rank fails" in done.stderr

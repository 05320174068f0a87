"""Ranks share an evaluation, whose files are those of one process, also after kill -9."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def evaluate(count: int, folder: Path, dies: int = -1) -> int:
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.run(
        [sys.executable, *(start if count > 1 else []), HERE / "two_ranks.py", folder, str(dies)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True, timeout=200).returncode


def test_two_ranks_write_what_one_process_does_and_resume_in_any_number(tmp_path: Path) -> None:
    whole = tmp_path / "one"
    assert evaluate(1, whole) == 0
    assert evaluate(2, tmp_path / "two", dies=2) != 0
    finished = (tmp_path / "two" / "items.jsonl").read_bytes().count(b"\n")
    assert finished == 16  # two rounds of two batches
    assert evaluate(1, tmp_path / "two", dies=1) != 0  # one more batch
    assert (tmp_path / "two" / "items.jsonl").read_bytes().count(b"\n") == 20
    assert evaluate(2, tmp_path / "two") == 0
    for name in ("plan.json", "items.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (whole / name).read_bytes()
    (digest, calls), (other, others) = (
        json.loads((tmp_path / f"two.{rank}").read_text()) for rank in (0, 1))
    assert digest == other == json.loads((whole / "results.json").read_text())["results_digest"]
    assert calls == others == 3  # of the five batches left, three and two and an empty one

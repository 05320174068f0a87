"""The benchmark for GPUs runs, at a tiny shape on the CPU, with transformers' losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"


def test_the_benchmark_has_the_losses_of_transformers() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--steps", "1", "--length", "32"], capture_output=True,
        text=True, timeout=200, env={**os.environ, "CUDA_VISIBLE_DEVICES": "",
                                     "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss_difference"] < 5e-3
    assert min(found[key] for key in ("ratio", "packed", "muon")) > 0

"""FSDP2 from the meta device: no process ever holds the whole float32 network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fsdp_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks stay")
def test_two_processes_train_what_neither_holds() -> None:
    """Peak memory, read from outside, while the network is initialised, trained, saved and loaded
    again; the losses are those of one process."""
    done = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one, many, network = found["one"], found["many"], found["network_bytes"]
    assert network > 80e6
    for phase in ("initialised", "saved", "loaded"):
        assert many["peaks"][phase] < network, phase
    # Weights, gradients and two moments are four networks, of which each process has half.
    assert one["peaks"]["trained"] > 4 * network
    for phase in ("trained", "trained again"):
        assert many["peaks"][phase] < 3 * network, phase
    assert len(one["losses"]) == 6
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)

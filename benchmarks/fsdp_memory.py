"""Memory of training under FSDP2: a network that no process ever holds whole in float32.

    python benchmarks/fsdp_memory.py [--processes 2] [--width 512] [--layers 6]

Starts one process and then several (gloo, on CPU), which build a network on the meta device, train
it for a few steps, save it, and start again from the checkpoint. Their peak resident memory is read
from outside (VmHWM in /proc/PID/status, Linux only), less that after the imports. Prints a table in
units of the float32 network's size and, last, one JSON line with the losses too.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

PHASES = ("initialised", "trained", "saved", "loaded", "trained again")
VOCAB, ROWS, LENGTH, STEPS = 4096, 2, 64, 3


def worker(folder: Path, width: int, layers: int) -> None:
    """One of the processes: says what it has done, then waits for a line on standard input."""
    import gc

    import torch

    from vicugna import checkpoint, models
    from vicugna.checkpoint import Checkpoint
    from vicugna.distributed import process_group
    from vicugna.memory import trim_heap
    from vicugna.training import parallel
    from vicugna.training.batch import TrainingBatch
    from vicugna.training.objectives import next_token
    from vicugna.training.recipe import OptimiserSpec, StageSpec
    from vicugna.training.trainer import train

    def done(phase: str) -> None:
        print(phase, flush=True)
        sys.stdin.readline()

    spec = StageSpec(kind="pretrain", steps=STEPS, precision="fp32", parallel="fsdp",
                     checkpoint_every=2,
                     optimiser=OptimiserSpec(kind="adamw", learning_rate=1e-3))
    with process_group() as ranks:
        def network(width: int, layers: int) -> torch.nn.Module:
            with torch.device("meta"):
                return models.build({
                    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": width,
                    "intermediate_size": 11 * width // 4, "num_hidden_layers": layers,
                    "num_attention_heads": 8, "tie_word_embeddings": True,
                    "max_position_embeddings": LENGTH})

        def batch(step: int, phase: str = "") -> TrainingBatch:
            if step == 0 and phase:
                done(phase)
            random = torch.Generator().manual_seed(step)
            tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=random)
            own = slice(ranks.rank * ROWS // ranks.world, (ranks.rank + 1) * ROWS // ranks.world)
            positions, weights = torch.arange(LENGTH).expand(ROWS, -1), torch.ones(ROWS, LENGTH)
            return TrainingBatch(tokens[own, :-1], positions[own], tokens[own, 1:], weights[own],
                                 float(weights.sum()))

        tiny = network(64, 1)  # what is imported or allocated once is there before it is measured
        train(tiny, next_token, batch, spec, folder / "tiny", "t", ranks,
              values=models.initial_values(tiny, 0))
        trim_heap()
        done("ready")
        first = network(width, layers)
        train(first, next_token, partial(batch, phase=PHASES[0]), spec, folder / "first", "t",
              ranks, values=models.initial_values(first, 0))
        done(PHASES[1])
        parallel.save(Checkpoint(first), folder / "checkpoint", ranks)
        done(PHASES[2])
        ranks.wait()
        del first
        gc.collect()
        second = checkpoint.read(folder / "checkpoint", device="meta")
        assert second.origin and second.origin.stream
        train(second.network, next_token, partial(batch, phase=PHASES[3]), spec, folder / "second",
              "t", ranks, values=second.origin.stream())
        done(PHASES[4])


def peak(pid: int) -> int:
    """Largest resident size of a process so far, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(folder: Path, processes: int, options: list[str]) -> dict[str, Any]:
    """Peaks by phase, of the largest process, above that after the imports; losses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}
    running = [subprocess.Popen([sys.executable, __file__, "--worker", str(folder), *options],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env={**environment, "RANK": str(rank)})
               for rank in range(processes)]
    base, peaks = [0] * processes, dict[str, int]()
    for phase in ("ready", *PHASES):
        for rank, process in enumerate(running):
            assert process.stdout
            assert process.stdout.readline() == f"{phase}\n"
            above = peak(process.pid) - base[rank]
            if phase == "ready":
                base[rank] = above
            else:
                peaks[phase] = max(peaks.get(phase, 0), above)
        for process in running:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # forget the peak
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
    assert [process.wait() for process in running] == [0] * processes
    rows = [json.loads(line) for name in ("first", "second")
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {"peaks": peaks, "losses": [row["loss"] for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--worker", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.width, options.layers)
        return
    arguments = [f"--width={options.width}", f"--layers={options.layers}"]
    found = {}
    for processes in (1, options.processes):
        with tempfile.TemporaryDirectory() as folder:
            found[processes] = measure(Path(folder), processes, arguments)
            weights = (Path(folder) / "checkpoint" / "model.safetensors").stat().st_size
    one, many = found[1], found[options.processes]
    print(f"the network is {weights / 1e6:.0f} MB in float32; peaks in networks")
    print(f"{'':16} {'1 process':>10} {f'{options.processes} processes':>12}")
    for phase in PHASES:
        print(f"{phase:16} {one['peaks'][phase] / weights:10.2f} "
              f"{many['peaks'][phase] / weights:12.2f}")
    print(json.dumps({"benchmark": "fsdp_memory", "network_bytes": weights,
                      "processes": options.processes, "one": one, "many": many}))


if __name__ == "__main__":
    main()

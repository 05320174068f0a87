"""From a folder on disk to the first logits: a llama of 1.2 billion parameters in bfloat16 shards,
by vicugna.load and by transformers' from_pretrained, both with dtype="auto", each time in a process
of its own, in interleaved rounds.

    python benchmarks/load.py [--rounds 5]

`cold` is what a program that uses PyTorch waits until the model runs: from importing the library to
the logits of one token. For the other figures everything is imported when the clock starts: the
process has loaded a tiny model of the same architecture and asked it for logits, which pulls in
whatever is imported on first use. It is read when loading returns (`load`) and when the logits of
one token are there (`first`). Both map the files, which are in the page cache since they were just
written, so that `first` is mostly the time to read the weights once; before it vicugna also looks
at every value, to report NaN. `memory` is the growth of the process up to its peak, mapped pages of
files included, in multiples of the weights.
Prints a table and, last, one JSON line. Ratios are medians over rounds of ours / theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {  # Llama 3.2 1B
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True}
TINY = {**SHAPE, "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKEN = 7
TIMES = "cold", "load", "first"


def make(folder: Path, shape: dict[str, Any]) -> int:
    """Write a checkpoint of random weights in shards of 1 GB; its bytes of weights."""
    from vicugna import checkpoint, models  # not above: importing it is part of `cold`
    from vicugna.checkpoint.hf import weights

    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    network = models.build(shape)
    torch.set_default_dtype(previous)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    weights.SHARD_BYTES = 10**9
    checkpoint.Checkpoint(network).save(folder)
    return sum(parameter.nbytes for parameter in network.parameters())


def by_vicugna(folder: str) -> tuple[float, torch.Tensor]:
    """When loading returned, and the logits of one token."""
    import vicugna

    model = vicugna.load(folder, dtype="auto")
    return time.perf_counter(), model.logits([[TOKEN]])


def by_transformers(folder: str) -> tuple[float, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = time.perf_counter()
    with torch.no_grad():
        return loaded, model(torch.tensor([[TOKEN]])).logits


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def measure(name: str, folder: str, *tiny: str) -> None:
    """In a process of its own, after a `tiny` model if there is one: print seconds, peak growth in
    bytes and some logits."""
    ask = {"vicugna": by_vicugna, "transformers": by_transformers}[name]
    for first in tiny:
        ask(first)
    before, start = memory("VmRSS"), time.perf_counter()
    loaded, logits = ask(folder)
    print(json.dumps({"load": loaded - start, "first": time.perf_counter() - start,
                      "peak": memory("VmHWM") - before,
                      "logits": logits[0, -1, :8].float().tolist()}))


def in_a_process(name: str, *folders: Path) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, __file__, "--measure", name, *map(str, folders)],
                           check=True, stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "HF_HUB_OFFLINE": "1",
                                "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        folder, tiny = Path(place) / "model", Path(place) / "tiny"
        make(tiny, TINY)
        nbytes = make(folder, SHAPE)
        for _ in range(options.rounds):
            theirs, ours = (in_a_process(name, folder, tiny)
                            | {"cold": in_a_process(name, folder)["first"]}
                            for name in ("transformers", "vicugna"))
            apart = max(abs(a - b) for a, b in zip(theirs["logits"], ours["logits"], strict=True))
            rounds.append({"transformers": theirs, "vicugna": ours})
            for name, seen in rounds[-1].items():
                print(f"{name:12} " + "   ".join(f"{what} {seen[what]:6.3f} s" for what in TIMES)
                      + f"   memory {seen['peak'] / nbytes:5.3f}", flush=True)
            print("ratio        " + "     ".join(f"{what} {ours[what] / theirs[what]:6.3f}"
                                                 for what in TIMES)
                  + f"     logits apart {apart:.4f}")
    print(json.dumps({
        "benchmark": "load",
        **{f"{what}_ratio": round(statistics.median(
            one["vicugna"][what] / one["transformers"][what] for one in rounds), 3)
           for what in TIMES},
        **{f"{name}_{what}": round(statistics.median(one[name][what] for one in rounds) / unit, 3)
           for name in ("vicugna", "transformers")
           for what, unit in (*((what, 1) for what in TIMES), ("peak", nbytes))},
        "rounds": options.rounds, "weights_bytes": nbytes, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()

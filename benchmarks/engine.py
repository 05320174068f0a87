"""Inference on CPU beside llama.cpp and transformers: decode, prefill, many sequences at once, a
long context, the first token and memory.

    python benchmarks/engine.py [--models smollm2 1b-q4_0 1b-q8_0] [--rounds 5] [--threads 2]

`smollm2` is the file of SmolLM2-135M-Instruct (`make smollm2`), `1b-*` random weights in the shape
of Llama 3.2 1B with a vocabulary of 32,000, written into a temporary folder or, to be used again,
into --folder. Every engine has a process of its own, which sleeps while another one works; rounds
are interleaved, figures are medians, ratios are medians of the rounds' ratios. The peers are
llama-cpp-python, in this Python or in the one that LLAMA_CPP_PYTHON names, with the same file and
threads, and transformers in bfloat16; without them only we are measured.

    decode     tokens/s after a prompt of 16 tokens
    prefill    tokens/s of a prompt of 512
    batch      16 prompts of 16 tokens at once: new tokens/s of all, the prompts' time included
    long       decode after 8,000 tokens; once, as reading them takes minutes (--no-long: never)
    first      seconds from the start of the process to the first token
    cold       the same with kernels that are still to be compiled
    memory     largest resident size of the process, MB; `loaded` is that less its size after the
               imports
    share      decode times the bytes of weights that a token needs, over the bandwidth at which
               PyTorch sums 512 MB with as many threads, measured in the same round

Prints a table for each model and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 16384, "rope_theta": 500000.0, "tie_word_embeddings": False}
Ask = Callable[[list[list[int]], int], list[float]]
CASES = {"decode": ((16,), 64), "prefill": ((512,), 1), "batch": ((16,) * 16, 32)}
LONG = (8000,), 32


# Engines: each makes what answers `ask(prompts, new)` with the seconds from the call until each
# step of new tokens, greedily chosen, was there (of several prompts perhaps only the last step).
# Between importing and loading it says how large the process is.

def imported() -> None:
    print(resident("self", "VmRSS"), flush=True)


def resident(pid: int | str, what: str) -> int:
    """Bytes of a process: VmRSS now, VmHWM at most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def vicugna_(path: str, threads: int) -> Ask:
    import torch

    import vicugna
    from vicugna import engine

    torch.set_num_threads(threads)
    imported()
    network = vicugna.load(path).network

    def ask(prompts: list[list[int]], new: int) -> list[float]:
        begun, sampling = time.perf_counter(), engine.Sampling(max_new_tokens=new)
        if len(prompts) == 1:
            return [time.perf_counter() - begun for delta in engine.stream(
                network, None, prompts[0], sampling) if delta.tokens]
        engine.generate(network, None, prompts, sampling)
        return [time.perf_counter() - begun]

    return ask


def llama_cpp(path: str, threads: int) -> Ask:
    import llama_cpp as api
    import numpy as np

    imported()
    api.llama_backend_init()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its log
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    V = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def ask(prompts: list[list[int]], new: int) -> list[float]:
        settings = api.llama_context_default_params()
        total = sum(map(len, prompts))
        settings.n_ctx, settings.n_batch = total + len(prompts) * (new + 1), max(total, 512)
        settings.n_threads = settings.n_threads_batch = threads
        settings.n_seq_max, settings.kv_unified = len(prompts), True
        context = api.llama_init_from_model(model, settings)
        batch = api.llama_batch_init(total, 0, 1)
        begun, times = time.perf_counter(), []
        todo, lengths = prompts, [0] * len(prompts)
        for _ in range(new):
            n, last = 0, []
            for sequence, tokens in enumerate(todo):
                for token in tokens:
                    batch.token[n], batch.pos[n], batch.logits[n] = token, lengths[sequence], 0
                    batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                    lengths[sequence] += 1
                    n += 1
                batch.logits[n - 1] = 1
                last.append(n - 1)
            batch.n_tokens = n
            if api.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            todo = [[int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, at), (V,)
                                               ).argmax())] for at in last]
            times.append(time.perf_counter() - begun)
        api.llama_batch_free(batch)
        api.llama_free(context)
        return times

    return ask


def transformers(path: str, threads: int) -> Ask:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    imported()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    @torch.no_grad()
    def ask(prompts: list[list[int]], new: int) -> list[float]:
        begun, times, past = time.perf_counter(), [], None
        tokens = torch.tensor(prompts)
        for _ in range(new):
            out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            tokens, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            times.append(time.perf_counter() - begun)
        return times

    return ask


ENGINES = {"vicugna": vicugna_, "llama.cpp": llama_cpp, "transformers": transformers}


def work(name: str, path: str, threads: int) -> None:
    """One engine's process: a line of JSON in, `prompts` and `new`, a line of seconds out."""
    ask = ENGINES[name](path, threads)
    for line in sys.stdin:
        print(json.dumps(ask(*json.loads(line))), flush=True)


class Worker:
    """An engine in a process of its own; `first` is when its first token was there."""

    def __init__(self, name: str, path: Path, threads: int, **environment: str) -> None:
        python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable) if name == "llama.cpp" else (
            sys.executable)
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, str(path), "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                 **environment})
        assert self.process.stdout
        self.imported = int(self.process.stdout.readline())
        self.ask((16,), 1)
        self.first = time.perf_counter() - begun

    def ask(self, lengths: tuple[int, ...], new: int) -> list[float]:
        """Seconds until each step, for prompts of these lengths."""
        prompts = [[(7919 * (n + 1) * (at + 1)) % 31000 + 500 for at in range(length)]
                   for n, length in enumerate(lengths)]
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([prompts, new]) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def rate(self, case: str, lengths: tuple[int, ...], new: int) -> float:
        """Tokens/s of a case."""
        times = self.ask(lengths, new)
        if case == "prefill":
            return lengths[0] / times[0]
        if case == "batch":
            return len(lengths) * new / times[-1]
        return (new - 1) / (times[-1] - times[0])

    def memory(self) -> dict[str, int]:
        """Largest resident size so far, MB, and that less the imports."""
        peak = resident(self.process.pid, "VmHWM")
        return {"memory": round(peak / 1e6), "loaded": round((peak - self.imported) / 1e6)}

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def bandwidth(threads: int) -> float:
    """Bytes/s at which PyTorch reads memory: the best of five sums of 512 MB."""
    import torch

    torch.set_num_threads(threads)
    numbers, best = torch.ones(2**27), float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begun)
    return numbers.nbytes / best


def make(folder: Path, name: str) -> tuple[Path, Path]:
    """The GGUF file of a model and its Hugging Face folder in bfloat16, made where they are not
    there yet."""
    import torch

    from vicugna import checkpoint, models
    from vicugna.checkpoint.convert import convert
    from vicugna.checkpoint.source import locate

    base, _, kind = name.partition("-")
    if base == "smollm2":
        path, source = locate("smollm2"), folder / "smollm2"
        if not source.exists():
            convert("smollm2", source, dtype="bfloat16", lossy=True)
        return path, source
    path, source = folder / f"{name}.gguf", folder / base
    if not source.exists():
        torch.set_default_dtype(torch.bfloat16)
        network = models.build(SHAPE)
        torch.set_default_dtype(torch.float32)
        models.initialise(network, 0)
        checkpoint.Checkpoint(network).save(source)
    if not path.exists():
        convert(source, path, dtype=kind, lossy=True)
    return path, source


def weights_read(path: Path) -> int:
    """Bytes of a GGUF file's tensors that a token needs: all but the table of embeddings, which is
    read only where it is the head too."""
    from vicugna.checkpoint.gguf.file import scan

    entries = scan(path)[1]
    return sum(entry.data.nbytes for name, entry in entries.items()
               if name != "token_embd.weight" or "output.weight" not in entries)


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every engine on one model."""
    path, source = make(folder, name)
    with ExitStack() as ending:
        workers = {}
        for engine in options.engines:
            worker = workers[engine] = Worker(
                engine, source if engine == "transformers" else path, options.threads)
            ending.callback(worker.close)
        found: dict[str, Any] = {engine: {"first": round(worker.first, 2)}
                                 for engine, worker in workers.items()}
        with tempfile.TemporaryDirectory() as cache:
            cold = Worker("vicugna", path, options.threads, XDG_CACHE_HOME=cache)
            found["vicugna"]["cold"] = round(cold.first, 2)
            cold.close()
        rounds: list[dict[tuple[str, str], float]] = []
        speeds = []
        for _ in range(options.rounds):
            speeds.append(bandwidth(options.threads))
            rounds.append({(engine, case): worker.rate(case, *of) for case, of in CASES.items()
                           for engine, worker in workers.items()
                           if engine != "transformers" or case != "batch"})
        if options.long:
            rounds[0] |= {(engine, "long"): worker.rate("long", *LONG)
                          for engine, worker in workers.items() if engine != "transformers"}
        for engine, worker in workers.items():
            found[engine] |= worker.memory()
    for engine, case in rounds[0]:
        found[engine][case] = round(statistics.median(
            one[engine, case] for one in rounds if (engine, case) in one), 1)
        if engine != "vicugna":
            found[engine][f"{case}_ratio"] = round(statistics.median(
                one["vicugna", case] / one[engine, case] for one in rounds
                if (engine, case) in one), 2)
    needs = weights_read(path)
    for engine in workers:
        if engine != "transformers":
            found[engine]["share"] = round(statistics.median(
                needs * one[engine, "decode"] / speed
                for one, speed in zip(rounds, speeds, strict=True)), 2)
    return found | {"file": path.stat().st_size,
                    "bandwidth": round(statistics.median(speeds) / 1e9, 1)}


def versions() -> dict[str, str]:
    """Of the engines here; of peers only if they are to be had."""
    here = ("torch", "numba", "transformers")
    found = {}
    for name, python in [(name, sys.executable) for name in here] + [
            ("llama_cpp", os.environ.get("LLAMA_CPP_PYTHON", sys.executable))]:
        ran = subprocess.run([python, "-c", f"import {name}; print({name}.__version__)"], text=True,
                             capture_output=True, check=False)
        if ran.returncode == 0:
            found[name] = ran.stdout.strip()
    return found


def show(name: str, found: dict[str, Any], engines: list[str]) -> None:
    print(f"\n{name}, {found['file'] / 1e6:,.0f} MB; memory is read at {found['bandwidth']} GB/s")
    print(f"{'':8}" + "".join(f"{engine:>13} {'ours':>6}" for engine in engines))
    for what in ("decode", "prefill", "batch", "long", "share", "first", "cold", "memory",
                 "loaded"):
        cells = "".join(f"{found[engine].get(what, ''):>13} "
                        f"{found[engine].get(f'{what}_ratio', ''):>6}" for engine in engines)
        if cells.strip():
            print(f"{what:8}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "1b-q4_0", "1b-q8_0"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker[0], options.worker[1], options.threads)
    known = versions()
    for engine, module in (("llama.cpp", "llama_cpp"), ("transformers", "transformers")):
        if engine in options.engines and module not in known:
            print(f"{engine} is not to be had here: it is left out", file=sys.stderr)
            options.engines.remove(engine)
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": options.threads}
    print(json.dumps(machine | known))
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        for name in options.models:
            found[name] = measure(name, options.folder or Path(temporary), options)
            show(name, found[name], options.engines)
    print(json.dumps({"benchmark": "engine", **machine, "versions": known, "models": found}))


def processor() -> str:
    """Its name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()

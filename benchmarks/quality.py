"""What packed weights cost in quality: perplexity, and the distance of the next-token probabilities
from those of float32, on real weights and real text.

    python benchmarks/quality.py [MODEL] [--tokens 8192] [--window 512]

MODEL is a checkpoint with a tokenizer, by default SmolLM2-135M-Instruct (`make smollm2`). The text
is the language reference that comes with Python (pydoc's topics), read in windows, each from an
empty context. `float` is MODEL computed in float32; the other rows are `--weights`. KL is that of
float32's probabilities from the row's, in nats a token; `same` says how often both find the same
token most probable.

Where llama-cpp-python is to be had, in this Python or in the one that LLAMA_CPP_PYTHON names, and
MODEL is a GGUF file, the perplexity that llama.cpp has on the same tokens stands beside.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vicugna
from vicugna.checkpoint.source import locate
from vicugna.engine import weights

PEER = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, windows = sys.argv[1], json.load(sys.stdin)
model = Llama(path, n_ctx=len(windows[0]), n_batch=512, logits_all=True, verbose=False)
total = 0.0
for tokens in windows:
    model.reset()
    model.eval(tokens)
    logits = np.asarray(model.scores[:len(tokens) - 1], np.float64)
    best = logits.max(-1)
    norm = best + np.log(np.exp(logits - best[:, None]).sum(-1))
    total += float((norm - logits[np.arange(len(tokens) - 1), tokens[1:]]).sum())
print(json.dumps(total))
"""


@dataclass
class Score:
    """What a form of the weights has lost so far: negative log-likelihoods of the text's tokens,
    and how far the probabilities are from float32's."""

    nll: float = 0.0
    kl: list[Tensor] = field(default_factory=list)
    same: int = 0

    def add(self, logits_TV: Tensor, reference_TV: Tensor, target_T: Tensor) -> None:
        p_TV, q_TV = reference_TV.log_softmax(-1), logits_TV.log_softmax(-1)
        self.nll -= float(q_TV.gather(-1, target_T[:, None]).double().sum())
        self.kl.append((p_TV.exp() * (p_TV - q_TV)).sum(-1))
        self.same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())

    def summary(self) -> dict[str, float]:
        kl_T = torch.cat(self.kl)
        return {"perplexity": math.exp(self.nll / len(kl_T)), "kl": float(kl_T.mean()),
                "kl_99": float(kl_T.quantile(0.99)), "same": self.same / len(kl_T)}


def text() -> str:
    """Prose about Python, a third of a million words."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def in_llama_cpp(path: Path, windows: list[list[int]]) -> float | None:
    """Perplexity of llama.cpp; None where it is not to be had."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    ran = subprocess.run([python, "-c", PEER, str(path)], input=json.dumps(windows), text=True,
                         capture_output=True, check=False)
    if ran.returncode:
        print(f"llama.cpp did not run: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    scored = sum(len(tokens) - 1 for tokens in windows)
    return math.exp(json.loads(ran.stdout.splitlines()[-1]) / scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()

    models = {how: vicugna.load(options.model, weights=how) for how in weights.WEIGHTS}
    sizes = {how: held(model.network) for how, model in models.items()}
    tokens = models["float"].text_tokenizer().encode(text())[: options.tokens]
    windows = [tokens[start : start + options.window]
               for start in range(0, len(tokens) - 1, options.window)]
    scores = {how: Score() for how in models}
    for window in windows:
        reference_TV = models["float"].logits([window])[0, :-1]
        for how, model in models.items():
            logits_TV = reference_TV if how == "float" else model.logits([window])[0, :-1]
            scores[how].add(logits_TV, reference_TV, torch.tensor(window[1:]))
    found: dict[str, Any] = {how: score.summary() | {"bytes": sizes[how]}
                             for how, score in scores.items()}
    path = locate(options.model)
    theirs = in_llama_cpp(path, windows) if path.suffix == ".gguf" else None

    base = found["float"]["perplexity"]
    print(f"{options.model}, {len(tokens):,} tokens in windows of {options.window}")
    print(f"{'weights':10} {'MB':>7} {'perplexity':>10} {'change':>8} {'KL':>9} {'99% KL':>8} "
          f"{'same':>6}")
    for how, row in found.items():
        print(f"{how:10} {row['bytes'] / 1e6:7.0f} {row['perplexity']:10.3f} "
              f"{row['perplexity'] / base - 1:8.2%} {row['kl']:9.6f} {row['kl_99']:8.5f} "
              f"{row['same']:6.1%}")
    if theirs:
        print(f"{'llama.cpp':10} {'':7} {theirs:10.3f} {theirs / base - 1:8.2%}; auto is "
              f"{found['auto']['perplexity'] / theirs - 1:+.2%} from it")
    print(json.dumps({"benchmark": "quality", "model": options.model, "tokens": len(tokens),
                      "window": options.window, "weights": found, "llama_cpp": theirs,
                      "torch": torch.__version__}))


def held(network: torch.nn.Module) -> int:
    """Bytes of a network's weights in memory."""
    packed = {id(matrix): matrix.nbytes for module in network.modules()
              if (matrix := getattr(module, "packed", None)) is not None}
    return sum(packed.values()) + sum(one.nbytes for one in network.parameters())


if __name__ == "__main__":
    main()

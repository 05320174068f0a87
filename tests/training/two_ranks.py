"""What two processes do for test_ranks.py, started by torchrun: train in every parallel mode.

Arguments: the folder to write to, and what to do. One process alone is the process to compare with.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kit import batch, network, spec, stopping_at
from torch import nn
from torch.distributed.tensor import DTensor

from vicugna import checkpoint, models, tokenizer
from vicugna.checkpoint import Checkpoint
from vicugna.distributed import Ranks, process_group
from vicugna.files import write_json
from vicugna.training import cost, parallel, rollouts
from vicugna.training.objectives import next_token, policy_gradient
from vicugna.training.recipe import RlSpec
from vicugna.training.trainer import train

ADAMW = {"kind": "adamw", "learning_rate": 0.01}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": (MIXED, {}), "fsdp": ({}, {"parallel": "fsdp", "optimiser": ADAMW}),
    "untied": ({**MIXED, "tie_word_embeddings": False}, {
        "parallel": "fsdp", "optimiser": ADAMW, "precision": "bf16"})}


def validated(ranks: Ranks, module: nn.Module, step: int) -> dict[str, float]:
    with torch.no_grad():
        loss = module(batch(1000, ranks.rank, ranks.world))
    return {"validation_loss": ranks.total(float(loss))[0]}


def trained(mode: str, folder: Path, ranks: Ranks, stop: int = 99) -> None:
    shape, stage = MODES[mode]
    with torch.device("meta"):
        net = models.build(network(**shape).config.to_dict())
    share = partial(batch, rank=ranks.rank, world=ranks.world)
    train(net, next_token, stopping_at(stop, share), spec(**stage), folder, mode, ranks,
          partial(validated, ranks), models.initial_values(net, 0))
    digest = parallel.save(Checkpoint(net), folder / "checkpoint", ranks)
    write_json(folder / f"digest-{ranks.rank}.json", digest)
    ranks.wait()
    saved = checkpoint.read(folder / "checkpoint")
    assert digest == (saved.digest if ranks.first else "")
    for name, tensor in net.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, saved.network.state_dict()[name]), name


def reinforced(folder: Path, ranks: Ranks) -> None:
    tok = tokenizer.train(["Tom has 3 apples and buys 4. How many? 7"] * 3, 300)
    stage = RlSpec(steps=3, prompts=4, group=4, tasks=({"source": "task:reasoning.steps"},),
                 precision="fp32", max_new_tokens=5, micro_rows=1,
                 optimiser={"learning_rate": 1e-4, "muon_learning_rate": 1e-3})
    net = network(vocab_size=tok.vocab_size, max_position_embeddings=4096, **MIXED)

    def answers(step: int) -> Any:
        made = rollouts.rollout(net, tok, stage, 0, step, ranks)
        if ranks.world == 1 or ranks.rank:
            return made
        # Ranks may have different numbers of rows: this one has one more, that weighs nothing.
        tokens, positions, targets = (torch.cat([x, x[:1]]) for x in (
            made.tokens_BT, made.positions_BT, made.targets_BT))
        weights = torch.cat([made.weights_BT, 0 * made.weights_BT[:1]])
        return replace(made, tokens_BT=tokens, positions_BT=positions, targets_BT=targets,
                       weights_BT=weights)

    train(net, policy_gradient, answers, stage, folder, "rl", ranks)


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    cost.matmul_rate = lambda dtype, device: 1e9  # type: ignore[assignment]
    rollouts.reward = lambda item, prompt, completion, tok: (  # type: ignore[assignment]
        sum(token % 2 for token in completion.tokens) / len(completion.tokens))
    with process_group() as ranks:
        if what == "fail":  # one rank fails while the other waits for it
            if ranks.rank == 1:
                raise RuntimeError("this rank fails")
            ranks.wait()
        if what == "resume":
            trained("fsdp", folder / "fsdp-one", ranks)
            return
        for mode in MODES:
            trained(mode, folder / mode, ranks)
        reinforced(folder / "rl", ranks)
        if ranks.world == 1:
            return
        for name in ("fsdp-killed", "fsdp-one", "ddp-killed"):
            with suppress(KeyboardInterrupt):
                trained(name.split("-")[0], folder / name, ranks, stop=5)
        for name in ("fsdp-killed", "ddp-killed"):
            trained(name.split("-")[0], folder / name, ranks)


if __name__ == "__main__":
    main()

"""Reinforcement learning from verifiable rewards: GRPO without its length and deviation biases.

Shao et al., arXiv 2402.03300, as corrected by Dr. GRPO (Liu et al., arXiv 2503.20783): the
advantage of an answer is its reward less the mean reward of its group, not divided by the group's
standard deviation, and an answer's tokens are summed, not averaged over its length. Each batch of
answers is used for one gradient step, so the policy that sampled is the one that learns, the
probability ratio is 1 and clipping never acts: the gradient is that of a weighted log-likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vicugna import engine, tasks
from vicugna.data import Row, SourceSpec, draw_item
from vicugna.data.mixing import schedule
from vicugna.data.packing import collate, pack
from vicugna.engine import Completion, Sampling
from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tasks import Item
from vicugna.tokenizer import Tokenizer
from vicugna.training.parallel import Ranks
from vicugna.training.recipe import RlSpec
from vicugna.training.trainer import WeightedBatch


@dataclass
class Answer:
    """One sampled answer: its tokens, reward in 0..1 and advantage over its group."""

    prompt: list[int]
    completion: Completion
    reward: float
    advantage: float


def rollout(network: nn.Module, tokenizer: Tokenizer, spec: RlSpec, seed: int, step: int,
            ranks: Ranks) -> WeightedBatch:
    """Sample and score this rank's answers of `step`; the batch whose loss is GRPO's.

    Groups whose answers all got the same reward teach nothing and are left out of the batch.
    """
    items = questions(spec, seed, step, ranks)
    prompts = [tokenizer.chat(item.messages) for item in items for _ in range(spec.group)]
    first = ranks.rank * len(prompts)  # of the step's answers; their seeds do not tell the ranks
    samplings = [Sampling(max_new_tokens=spec.max_new_tokens, temperature=spec.temperature,
                          seed=int(digest_of([seed, step, answer])[:12], 16))
                 for answer in range(first, first + len(prompts))]
    network.eval()
    completions = engine.generate(network, tokenizer, prompts, samplings)
    network.train()
    answers: list[Answer] = []
    for g, item in enumerate(items):
        rows = range(g * spec.group, (g + 1) * spec.group)
        rewards = [reward(item, completions[row], tokenizer) for row in rows]
        mean = sum(rewards) / spec.group
        answers += [Answer(prompts[row], completions[row], got, got - mean)
                    for row, got in zip(rows, rewards, strict=True)]
    total, cut, length, count = ranks.total(
        sum(a.reward for a in answers),
        sum(a.completion.finish_reason == "length" for a in answers),
        sum(len(a.completion.tokens) for a in answers), len(answers))
    extra = {"reward": total / count, "truncated": cut / count, "length": length / count}
    return batch([a for a in answers if a.advantage != 0] or answers[:1], tokenizer.pad_id, count,
                 extra)


def questions(spec: RlSpec, seed: int, step: int, ranks: Ranks) -> list[Item]:
    """This rank's questions of `step`, from the training split, the tasks mixed by weight."""
    if spec.prompts % ranks.world:
        raise VicugnaError(f"{spec.prompts} prompts cannot be shared by {ranks.world} processes",
                           "rl.prompts", "Use a multiple of the number of processes")
    share = spec.prompts // ranks.world
    order = schedule([source.weight for source in spec.tasks])
    first = step * spec.prompts + ranks.rank * share
    return [draw_item(spec.tasks[order[n % len(order)]], "train", seed, n, 0)
            for n in range(first, first + share)]


def reward(item: Item, completion: Completion, tokenizer: Tokenizer) -> float:
    """The task's score of the answer after its reasoning; 0 for one that was cut off."""
    if completion.finish_reason != "stop":
        return 0.0
    return tasks.get(item.task).score(item, tokenizer.split_reasoning(completion.tokens)[1])


def batch(answers: Sequence[Answer], pad: int, count: float, extra: dict[str, float]
          ) -> WeightedBatch:
    """Answers packed into rows of one length, each sampled token weighted by its advantage."""
    documents = [(np.asarray(a.prompt + a.completion.tokens, np.int32), a) for a in answers]
    documents.sort(key=lambda document: len(document[0]), reverse=True)
    length = max(2 * len(documents[0][0]), 256)
    rows: list[Row] = []
    weights: list[np.ndarray] = []
    while documents:
        at, parts, weight, left = 0, [], np.zeros(length, np.float32), []
        for ids, answer in documents:  # longest first, whatever still fits
            end = at + len(ids)
            if end > length:
                left.append((ids, answer))
                continue
            parts.append((ids, np.arange(len(ids)) >= len(answer.prompt)))
            weight[at + len(answer.prompt):end] = answer.advantage
            at = end
        documents = left
        rows.append(pack(parts, length, pad))
        weights.append(weight)
    made = collate(rows)
    weights_BT = torch.from_numpy(np.stack(weights))[:, 1:].contiguous()
    return WeightedBatch(made.tokens_BT, made.positions_BT, made.targets_BT.clamp(min=0),
                         weights_BT, count, extra)


def check(specs: Sequence[SourceSpec], parallel: str) -> None:
    """Raise VicugnaError unless every source is a procedural task and the network stays whole."""
    for spec in specs:
        if not spec.source.startswith("task:"):
            raise VicugnaError(f"{spec.source!r} gives no rewards", "rl.tasks",
                               "Use procedural tasks, such as task:reasoning.steps")
        tasks.get(spec.source.removeprefix("task:"))
    if parallel != "ddp":
        raise VicugnaError("answers are sampled from the whole network, which FSDP2 shards",
                           "rl.parallel", "Use parallel: ddp")


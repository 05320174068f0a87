"""Reinforcement learning from verifiable rewards: GRPO without its length and deviation biases.

Shao et al., arXiv 2402.03300, as corrected by Dr. GRPO (Liu et al., arXiv 2503.20783): the
advantage of an answer is its reward less its group's mean, not divided by the group's standard
deviation, and an answer's tokens are summed, not averaged. A batch is used for one step, so the
probability ratio is 1: the gradient is that of a weighted log-likelihood."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vicugna import engine, tasks
from vicugna.data import IGNORED, SourceSpec, draw_item
from vicugna.data.mixing import schedule
from vicugna.data.packing import collate, pack
from vicugna.distributed import Ranks
from vicugna.engine import Completion, Sampling
from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tasks import Item
from vicugna.tokenizer import Tokenizer
from vicugna.training.recipe import RlSpec
from vicugna.training.trainer import WeightedBatch, padding


@dataclass
class Answer:
    """One sampled answer: its tokens, reward in 0..1 and advantage over its group."""
    prompt: list[int]
    completion: Completion
    reward: float
    advantage: float


def rollout(network: nn.Module, tokenizer: Tokenizer, spec: RlSpec, seed: int, step: int,
            ranks: Ranks) -> WeightedBatch:
    """Sample and score this rank's answers of `step`; the batch whose loss is GRPO's. Groups whose
    answers all got the same reward teach nothing and are left out of it."""
    items = [item for item in questions(spec, seed, step, ranks) for _ in range(spec.group)]
    prompts = [tokenizer.chat(item.messages) for item in items]
    first = ranks.rank * len(prompts)  # of the step's answers; their seeds do not tell the ranks
    samplings = [Sampling(max_new_tokens=spec.max_new_tokens, temperature=spec.temperature,
                          seed=int(digest_of([seed, step, answer])[:12], 16))
                 for answer in range(first, first + len(prompts))]
    network.eval()
    completions = engine.generate(network, tokenizer, prompts, samplings)
    network.train()
    rewards = [reward(items[n], prompts[n], said, tokenizer) for n, said in enumerate(completions)]
    answers = []
    for n, got in enumerate(rewards):
        start = n - n % spec.group
        mean = sum(rewards[start:start + spec.group]) / spec.group
        answers.append(Answer(prompts[n], completions[n], got, got - mean))
    total, cut, length, count = ranks.total(
        sum(rewards), sum(said.finish_reason == "length" for said in completions),
        sum(len(said.tokens) for said in completions), len(answers))
    taught = [a for a in answers if a.advantage != 0] or answers[:1]
    return batch(taught, padding(tokenizer, network), count, {
        "reward": total / count, "truncated": cut / count, "length": length / count})


def questions(spec: RlSpec, seed: int, step: int, ranks: Ranks) -> list[Item]:
    """This rank's questions of `step`, from the training split, the tasks mixed by weight."""
    share, left = divmod(spec.prompts, ranks.world)
    if left:
        raise VicugnaError(f"{spec.prompts} prompts cannot be shared by {ranks.world} processes",
                           "rl.prompts", "Use a multiple of the number of processes")
    order = schedule([source.weight for source in spec.tasks])
    first = step * spec.prompts + ranks.rank * share
    return [draw_item(spec.tasks[order[n % len(order)]], "train", seed, n, 0)
            for n in range(first, first + share)]


def reward(item: Item, prompt: list[int], completion: Completion, tokenizer: Tokenizer) -> float:
    """The task's score of the answer after its reasoning; 0 for one that was cut off."""
    if completion.finish_reason != "stop":
        return 0.0
    return tasks.get(item.task).score(item, tokenizer.split_reasoning(completion.tokens, prompt)[1])


def batch(answers: list[Answer], pad: int, count: float, extra: dict[str, float]) -> WeightedBatch:
    """Answers packed into rows of one length, each sampled token weighted by its advantage."""
    left = [(np.asarray(a.prompt + a.completion.tokens, np.int32), a) for a in answers]
    left.sort(key=lambda one: -len(one[0]))
    length = max(2 * len(left[0][0]), 256)
    rows, weights = [], []
    while left:
        parts, waiting, room = [], [], length
        for ids, answer in left:  # longest first, whatever still fits
            if len(ids) > room:
                waiting.append((ids, answer))
                continue
            room -= len(ids)
            parts.append((ids, np.arange(len(ids)) >= len(answer.prompt)))
            weights += [answer.advantage] * len(answer.completion.tokens)
        rows.append(pack(parts, length, pad))
        left = waiting
    made = collate(rows)
    weights_BT = torch.zeros(made.targets_BT.shape)
    weights_BT[made.targets_BT != IGNORED] = torch.tensor(weights)
    return WeightedBatch(made.tokens_BT, made.positions_BT, made.targets_BT.clamp(min=0),
                         weights_BT, count, extra)


def check(specs: tuple[SourceSpec, ...], parallel: str) -> None:
    """Raise VicugnaError unless every source is a procedural task and the network stays whole."""
    for spec in specs:
        if not spec.source.startswith("task:"):
            raise VicugnaError(f"{spec.source!r} gives no rewards", "rl.tasks",
                               "Use procedural tasks, such as task:reasoning.steps")
        tasks.get(spec.source.removeprefix("task:"))
    if parallel != "ddp":
        raise VicugnaError("answers are sampled from the whole network, which FSDP2 shards",
                           "rl.parallel", "Use parallel: ddp")

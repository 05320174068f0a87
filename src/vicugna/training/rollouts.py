"""Reinforcement learning from verifiable rewards: roll-outs, rewards and advantages.

The advantage of a response is its reward less its group's mean, not divided by the group's standard
deviation. For the sources see the loss, objectives.policy_gradient."""

from dataclasses import dataclass
from datetime import date as Date

import numpy as np
import torch
from torch import nn

from vicugna import chat, engine, tasks
from vicugna.data import SourceSpec, draw_item
from vicugna.data.mixing import schedule
from vicugna.data.packing import collate, pack
from vicugna.distributed import Ranks
from vicugna.engine import Completion, Sampling
from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tasks import Item
from vicugna.tokenizer import Tokenizer
from vicugna.training.batch import TrainingBatch, padding
from vicugna.training.recipe import RlSpec


@dataclass
class Response:
    """One sampled response: its tokens, reward in 0..1 and advantage over its group."""
    prompt: list[int]
    completion: Completion
    reward: float
    advantage: float


def rollout(network: nn.Module, tokenizer: Tokenizer, spec: RlSpec, seed: int, step: int,
            ranks: Ranks, date: Date | None = None) -> TrainingBatch:
    """Sample and score this rank's responses of `step`: the batch for objectives.policy_gradient.
    Groups whose responses all have the same reward have no gradient and are left out of it.
    `date` is the day that a chat template may ask for."""
    items = [item for item in questions(spec, seed, step, ranks) for _ in range(spec.group)]
    prompts = [chat.encode(tokenizer, item.messages, date=date) for item in items]
    first = ranks.rank * len(prompts)  # among the step's responses: seeds do not depend on ranks
    samplings = [Sampling(max_new_tokens=spec.max_new_tokens, temperature=spec.temperature,
                          seed=int(digest_of([seed, step, number])[:12], 16))
                 for number in range(first, first + len(prompts))]
    network.eval()
    completions = engine.generate(network, tokenizer, prompts, samplings)
    network.train()
    rewards = [reward(*one, tokenizer) for one in zip(items, prompts, completions, strict=True)]
    responses = []
    for n, value in enumerate(rewards):
        start = n - n % spec.group
        mean = sum(rewards[start:start + spec.group]) / spec.group
        responses.append(Response(prompts[n], completions[n], value, value - mean))
    total, truncated, length, count = ranks.total(
        sum(rewards), sum(one.finish_reason == "length" for one in completions),
        sum(len(one.tokens) for one in completions), len(responses))
    informative = [one for one in responses if one.advantage != 0] or responses[:1]
    return batch(informative, padding(tokenizer, network), count, {
        "reward": total / count, "truncated": truncated / count, "length": length / count})


def questions(spec: RlSpec, seed: int, step: int, ranks: Ranks) -> list[Item]:
    """This rank's questions of `step`, from the training split, the tasks mixed by weight."""
    share, left = divmod(spec.prompts, ranks.world)
    if left:
        raise VicugnaError(f"{spec.prompts} prompts cannot be shared by {ranks.world} processes",
                           f"stages.{spec.name}.prompts",
                           "Use a multiple of the number of processes")
    order = schedule([source.weight for source in spec.tasks])
    first = step * spec.prompts + ranks.rank * share
    return [draw_item(spec.tasks[order[n % len(order)]], "train", seed, n, 0)
            for n in range(first, first + share)]


def reward(item: Item, prompt: list[int], completion: Completion, tokenizer: Tokenizer) -> float:
    """The task's score of the response without its reasoning; 0 for a truncated one."""
    if completion.finish_reason != "stop":
        return 0.0
    _, content = chat.parse_reply(tokenizer, completion.tokens, prompt)
    return tasks.get(item.task).score(item, content)


def batch(responses: list[Response], pad: int, norm: float, metrics: dict[str, float]
          ) -> TrainingBatch:
    """Responses packed into rows of one length, each sampled token weighted by its advantage."""
    documents = sorted(((np.asarray(r.prompt + r.completion.tokens, np.int32), r)
                        for r in responses), key=lambda one: -len(one[0]))
    length = max(2 * len(documents[0][0]), 256)
    rows: list[list[tuple[np.ndarray, Response]]] = []
    for document in documents:  # longest first, each into the first row in which it fits
        row = next((row for row in rows
                    if sum(len(ids) for ids, _ in [*row, document]) <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(document)
    packed = collate([pack([(ids, np.arange(len(ids)) >= len(r.prompt)) for ids, r in row],
                           length, pad) for row in rows])
    packed.weights_BT[packed.weights_BT != 0] = torch.tensor(
        [r.advantage for row in rows for _, r in row for _ in r.completion.tokens])
    return TrainingBatch(**vars(packed), norm=norm, metrics=metrics)


def check(specs: tuple[SourceSpec, ...], parallel: str, where: str = "stages.rl") -> None:
    """Raise VicugnaError unless every source is a procedural task and nothing is sharded."""
    for spec in specs:
        if not spec.source.startswith("task:"):
            raise VicugnaError(f"{spec.source!r} gives no rewards", f"{where}.tasks",
                               "Use procedural tasks, such as task:reasoning.steps")
        tasks.get(spec.source.removeprefix("task:"))
    if parallel != "ddp":
        raise VicugnaError("responses are sampled from the full network, which FSDP2 shards",
                           f"{where}.parallel", "Use parallel: ddp")

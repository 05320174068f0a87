"""Policy gradients: the packed batch against a plain computation for each answer, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import network, stopping_at
from torch import nn

from vicugna import tokenizer
from vicugna.distributed import Ranks
from vicugna.engine import Completion
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense
from vicugna.tasks import split_of
from vicugna.training import rollouts
from vicugna.training.loss import Loss
from vicugna.training.objectives import policy_gradient
from vicugna.training.recipe import RlSpec
from vicugna.training.rollouts import Response, batch, questions, rollout
from vicugna.training.trainer import train

ONE_PROCESS = Ranks()
STEPS = {"source": "task:reasoning.steps", "difficulty": {"depth": 2}}


@pytest.fixture(scope="module")
def tok() -> tokenizer.Tokenizer:
    return tokenizer.train(["Tom has 3 apples and buys 4. How many? 7"] * 3, 300)


def spec(**other: Any) -> RlSpec:
    return RlSpec(**{"steps": 4, "prompts": 2, "group": 3, "tasks": (STEPS,), "precision": "fp32",
                     "checkpoint_every": 1, "max_new_tokens": 6, **other})


def policy(tok: tokenizer.Tokenizer) -> nn.Module:
    return network(vocab_size=tok.vocab_size, max_position_embeddings=4096)


def responses() -> list[Response]:
    random = torch.Generator().manual_seed(0)
    made = []
    for n in range(9):
        prompt = torch.randint(40, (4 + 11 * n,), generator=random).tolist()
        reply = torch.randint(40, (1 + 5 * (n % 4),), generator=random).tolist()
        completion = Completion(reply, [], [], "stop", "", len(prompt))
        made.append(Response(prompt, completion, 0.0, (-1.0) ** n * (n + 1) / 10))
    return made


def test_the_batch_is_the_sum_over_responses() -> None:
    """Gradients of advantage times log-likelihood of the sampled tokens, response by response."""
    packed, single = network(max_position_embeddings=512), network(max_position_embeddings=512)
    made = batch(responses(), 0, 12.0, {})
    assert made.tokens_BT.shape[0] > 1  # several rows,
    assert int((made.positions_BT == 0).sum()) > made.tokens_BT.shape[0]  # several in a row
    Loss(packed, policy_gradient, "fp32")(made).backward()
    for response in responses():
        ids = torch.tensor([response.prompt + response.completion.tokens])
        hidden = single(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None], Dense())
        log_p = single.lm_head(hidden)[0].log_softmax(-1)
        reply = torch.arange(len(response.prompt) - 1, ids.shape[1] - 1)
        (-response.advantage * log_p[reply, ids[0, reply + 1]].sum()).backward()
    for (name, one), two in zip(packed.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert made.norm == 12.0


def fake_reward(item: Any, prompt: Any, completion: Completion, tok: Any) -> float:
    return sum(token % 2 for token in completion.tokens) / len(completion.tokens)


def test_advantages_are_rewards_less_their_groups_mean(
        tok: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "reward", fake_reward)
    seen: list[Response] = []
    real = rollouts.batch
    monkeypatch.setattr(rollouts, "batch", lambda a, *rest: (seen.extend(a), real(a, *rest))[1])
    made = rollout(policy(tok), tok, spec(prompts=4, group=3), 0, 0, ONE_PROCESS)
    assert made.norm == 12 and made.metrics["length"] == 6 and made.metrics["truncated"] == 1
    assert 0 < made.metrics["reward"] < 1
    by_prompt: dict[tuple[int, ...], list[Response]] = {}
    for answer in seen:
        by_prompt.setdefault(tuple(answer.prompt), []).append(answer)
    for group in by_prompt.values():
        mean = sum(a.reward for a in group) / 3
        assert sum(a.advantage for a in group) == pytest.approx(0, abs=1e-9)
        assert all(a.advantage == pytest.approx(a.reward - mean) for a in group if len(group) == 3)
    assert len({tuple(a.completion.tokens) for a in seen}) == len(seen)  # each has its own seed


def test_equal_rewards_have_no_gradient(tok: tokenizer.Tokenizer) -> None:
    made = rollout(policy(tok), tok, spec(), 0, 0, ONE_PROCESS)  # all are cut off: reward 0
    assert made.metrics["reward"] == 0 and not made.weights_BT.any()


def test_reinforcement_killed_ends_in_the_same_bytes(
        tok: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rollouts, "reward", fake_reward)
    weights = []
    for name, stops in (("undisturbed", []), ("killed", [1, 3])):
        for stop in [*stops, 99]:
            net, stage = policy(tok), spec(optimiser={"muon_learning_rate": 0.1, "warmup": 0})
            make = stopping_at(stop, lambda step, net=net, stage=stage: rollout(
                net, tok, stage, 0, step, ONE_PROCESS))
            try:
                train(net, policy_gradient, make, stage, tmp_path / name, "rl", ONE_PROCESS)
            except KeyboardInterrupt:
                continue
        weights.append({k: v.numpy().tobytes() for k, v in net.state_dict().items()})
    assert weights[0] == weights[1]
    assert any(bool((p != q).any()) for p, q in zip(
        net.parameters(), policy(tok).parameters(), strict=True))


def test_rewards_raise_what_is_rewarded(
        tok: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rollouts, "reward", fake_reward)
    net, stage = policy(tok), spec(steps=25, prompts=4, group=4,
                                   optimiser={"learning_rate": 0.02, "warmup": 0})
    train(net, policy_gradient, lambda step: rollout(net, tok, stage, 0, step, ONE_PROCESS), stage,
          tmp_path, "rl", ONE_PROCESS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_questions_are_shared_and_of_the_training_split() -> None:
    stage = spec(prompts=6)
    one = questions(stage, 0, 3, ONE_PROCESS)
    shared = [item for rank in range(3) for item in questions(stage, 0, 3, Ranks(rank, 3))]
    assert [item.messages for item in shared] == [item.messages for item in one]
    assert {split_of(item.seed) for item in one} == {"train"}
    assert not {item.seed for item in questions(stage, 0, 4, ONE_PROCESS)} & {i.seed for i in one}
    with pytest.raises(VicugnaError, match="6 prompts cannot be shared by 4 processes"):
        questions(stage, 0, 0, Ranks(0, 4))


def test_what_cannot_be_rewarded_is_refused() -> None:
    with pytest.raises(VicugnaError, match="gives no rewards"):
        rollouts.check(spec(tasks=({"source": "stdlib"},)).tasks, "ddp")
    with pytest.raises(VicugnaError, match="retrieval"):
        rollouts.check(spec(tasks=({"source": "task:retrieval.singel"},)).tasks, "ddp")
    with pytest.raises(VicugnaError, match="Use parallel: ddp"):
        rollouts.check(spec().tasks, "fsdp")

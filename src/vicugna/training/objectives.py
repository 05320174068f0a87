"""Objectives, functions of log-probabilities and a batch: `loss = objective(logprobs, batch)`.

`logprobs_BT` are float32 log-probabilities of `batch.targets_BT`, 0 where `batch.weights_BT` is 0.
A loss is a sum over this process's rows: the trainer divides the sum over all by `batch.norm`. A
new objective is a function here; one that needs another batch subclasses TrainingBatch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vicugna.training.batch import TrainingBatch

Objective = Callable[[Tensor, TrainingBatch], Tensor]


def next_token(logprobs_BT: Tensor, batch: TrainingBatch) -> Tensor:
    """Cross-entropy: pretraining and supervised fine-tuning, targets weighted by `weights_BT`."""
    return -(logprobs_BT * batch.weights_BT).sum()


def policy_gradient(logprobs_BT: Tensor, batch: TrainingBatch) -> Tensor:
    """REINFORCE on sampled tokens, whose `weights_BT` are their advantages. With advantages over a
    group's mean (rollouts.py) it is GRPO (Shao et al., arXiv 2402.03300) as corrected by Dr. GRPO
    (Liu et al., arXiv 2503.20783): a response's tokens are summed, not averaged. Each batch serves
    one step, so the probability ratio is 1 and there is nothing to clip."""
    return -(logprobs_BT * batch.weights_BT).sum()


# Linear in the log-probabilities, whose gradients are then made in the forward pass (logprobs.py).
LINEAR = {next_token, policy_gradient}


def balance_loss(logits_LNE: Tensor, top_k: int) -> Tensor:
    """The auxiliary loss that pulls the routers of L layers to an even load: E times the sum over
    experts of its choices per token and its mean probability, both over all layers (Switch
    Transformer, arXiv 2101.03961, eq. 4, as transformers takes it). Added to the objective."""
    probability_ME = logits_LNE.flatten(0, 1).float().softmax(-1)
    M, E = probability_ME.shape
    chosen_Mk = probability_ME.topk(top_k, dim=-1).indices
    count_E = torch.bincount(chosen_Mk.flatten(), minlength=E)
    return E * (count_E * probability_ME.sum(0)).sum() / max(1, M) ** 2

"""Sampling the next tokens of a batch from logits."""

import math
from collections import defaultdict
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.errors import VicugnaError

_PREFIX = 128  # most likely tokens tried before the whole vocabulary is sorted
TopLogprobs = list[tuple[int, float]]


@dataclass(frozen=True)
class Sampling:
    """How to continue one prompt.

    `temperature` 0 takes the most likely token. Otherwise logits are divided by it, then `top_k`
    (0: off), `top_p` over what is left, and `min_p` (share of the most likely token's
    probability) filter in this order, as in transformers. `stop` strings end the text before
    themselves. `seed` (>= 0) is that of the row's own random stream. The `top_logprobs` most likely
    tokens are reported at each step. Raises VicugnaError for values outside their range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        rules = [(name, isinstance(value := getattr(self, name), Integral) and int(value) >= least,
                  f"a whole number, at least {least}") for name, least in (
                      ("max_new_tokens", 1), ("top_k", 0), ("seed", 0), ("top_logprobs", 0))]
        rules += [("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
                  ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                  ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
                  ("stop", all(isinstance(s, str) and s for s in stop), "strings, none empty")]
        for name, good, rule in rules:
            if not good:
                raise VicugnaError(f"{name} is {getattr(self, name)!r}", "sampling",
                                   f"It must be {rule}")


def random_stream(seed: int, copy: int) -> np.random.Generator:
    """The random numbers of copy number `copy` of a request with this seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(copy,))))


class Sampler:
    """Chooses tokens for the rows of a batch, each by its own settings and stream alone, whatever
    else is in the batch."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._samplings = device, list[Sampling]()

    def _arrange(self, samplings: list[Sampling]) -> None:
        """Group the rows by the work they need."""
        self._samplings = samplings
        groups = defaultdict(list)
        for b, s in enumerate(samplings):
            if s.temperature > 0:  # others are greedy
                groups[s.top_k > 0 or s.top_p < 1 or s.min_p > 0].append(b)
        self._groups = [(filtered, rows, torch.tensor(rows, device=self._device)
                         if len(rows) < len(samplings) else slice(None))  # no copy
                        for filtered, rows in groups.items()]
        # A temperature below float32's range would divide 0 by 0.
        self._settings_B4 = torch.tensor(
            [(max(s.temperature, 1e-30), min(s.top_k, 2**31), s.top_p, s.min_p)
             for s in samplings], dtype=torch.float64, device=self._device)
        self._top = max(s.top_logprobs for s in samplings)

    def choose(self, logits_BV: Tensor, samplings: list[Sampling],
               streams: list[np.random.Generator]
               ) -> tuple[list[int], list[float], list[TopLogprobs]]:
        """The next token of every row, its log-probability, and the most likely ones with theirs;
        log-probabilities are the network's own, float32. A row that is not greedy draws one number
        from its stream. VicugnaError for NaN or infinity."""
        if samplings != self._samplings:
            self._arrange(samplings)
        logits_BV = logits_BV.float()
        tokens_B1, best_B1, log_sum_B1 = _most_likely(logits_BV)
        if not bool(best_B1.isfinite().all()):
            raise VicugnaError("the logits are NaN or infinite", "generation",
                               "The weights are damaged, or training diverged")
        for filtered, numbers, rows in self._groups:
            uniform_R1 = torch.tensor([[streams[b].random()] for b in numbers],
                                      dtype=torch.float64, device=self._device)
            temperature_R1, k_R1, p_R1, min_R1 = self._settings_B4[rows].split(1, dim=1)
            # Subtracting the largest keeps small temperatures from overflowing.
            score_RV = (logits_BV[rows] - best_B1[rows]).div_(temperature_R1.float())
            probs_RV = torch.softmax(score_RV, dim=-1)
            if filtered:
                nucleus_RN, order_RN = truncate(probs_RV, k_R1, p_R1, min_R1)
                tokens_B1[rows] = order_RN.gather(1, inverse_cdf(nucleus_RN, uniform_R1))
            else:
                tokens_B1[rows] = inverse_cdf(probs_RV, uniform_R1)
        tokens = tokens_B1[:, 0].tolist()
        logprobs = (logits_BV.gather(1, tokens_B1) - best_B1 - log_sum_B1)[:, 0].tolist()
        if not self._top:
            return tokens, logprobs, [[] for _ in samplings]
        values, top = logits_BV.topk(min(self._top, logits_BV.shape[1]), dim=-1)
        tops = [list(zip(t[: s.top_logprobs], v[: s.top_logprobs], strict=True))
                for t, v, s in zip(top.tolist(), (values - best_B1 - log_sum_B1).tolist(),
                                   samplings, strict=True)]
        return tokens, logprobs, tops


def _most_likely(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the most likely token, its logit, and the logarithm of the sum of all
    exponentials, that logit subtracted; each [B, 1]. On a CPU with one thread: PyTorch would wake
    its own, which then keep the cores from those of the engine's kernels."""
    if logits_BV.device.type != "cpu":
        best_B1, tokens_B1 = logits_BV.max(dim=-1, keepdim=True)
        return tokens_B1, best_B1, (logits_BV - best_B1).logsumexp(-1, keepdim=True)
    logits = logits_BV.numpy()
    tokens = logits.argmax(-1)[:, None]
    best = np.take_along_axis(logits, tokens, -1)
    with np.errstate(invalid="ignore"):  # of logits that are refused
        shares = logits - best
        log_sum = np.log(np.exp(shares, out=shares).sum(-1, keepdims=True))
    return torch.from_numpy(tokens), torch.from_numpy(best), torch.from_numpy(log_sum)


def inverse_cdf(weights_RN: Tensor, uniform_R1: Tensor) -> Tensor:
    """The index at which the cumulative share of `weights_RN` passes `uniform_R1`, int64 [R, 1];
    never an index of weight 0. Sums are float64."""
    cumulative_RN = weights_RN.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulative_RN, uniform_R1 * cumulative_RN[:, -1:], right=True)


def truncate(probs_RV: Tensor, k_R1: Tensor, p_R1: Tensor, min_R1: Tensor
             ) -> tuple[Tensor, Tensor]:
    """Probabilities that survive top-k, top-p and min-p, most likely first, and their tokens.

    Returns float64 [R, N] (0 where cut) and int64 [R, N]. What survives is always a prefix of the
    order, so N grows from a short prefix to V only while some row keeps all of it.
    """
    V = probs_RV.shape[1]
    N = min(V, max(_PREFIX, int(k_R1.max()) + 1))
    while True:
        top_RN, order_RN = (probs_RV.topk(N, dim=-1) if N < V else
                            probs_RV.sort(dim=-1, descending=True, stable=True))
        top_RN = top_RN.double()
        rank_N = torch.arange(N, device=probs_RV.device)
        within_k_RN = (rank_N < k_R1) | (k_R1 == 0)
        sums_RN = (top_RN * within_k_RN).cumsum(dim=-1)
        # Without top-k the whole mass is 1; it need not lie inside the prefix.
        mass_R1 = torch.where(k_R1 == 0, 1.0, sums_RN[:, -1:])
        before_RN = F.pad(sums_RN[:, :-1], (1, 0))
        keep_RN = within_k_RN & ((before_RN < p_R1 * mass_R1) | (p_R1 == 1))
        keep_RN &= top_RN >= min_R1 * top_RN[:, :1]
        if N == V or not bool(keep_RN[:, -1].any()):
            return top_RN * keep_RN, order_RN
        N = min(V, 8 * N)

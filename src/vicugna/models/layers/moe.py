"""Mixture-of-experts layers: routers, experts, and the balance of their load."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def routed(x_ND: Tensor, chosen_Nk: Tensor, weight_Nk: Tensor,
           gate_up_EFD: Tensor | nn.ModuleList, down_EDF: Tensor | nn.ModuleList,
           weigh_input: bool = False) -> Tensor:
    """Sum over each token's k chosen experts of weight * expert(x), or of expert(weight * x) with
    `weigh_input`; an expert is down(silu(gate(x)) * up(x)). [N, D]

    `chosen_Nk` are int64 indices of experts. `gate_up_EFD` [E, 2F, D] holds gates above ups,
    `down_EDF` is [E, D, F]; views will do. Where the engine packed them, they are lists of E
    modules, each the product with its matrix. Tokens are sorted by expert, one block for each.
    """
    N, k = chosen_Nk.shape
    expert_M, order_M = chosen_Nk.flatten().sort(stable=True)
    token_M = order_M // k
    x_MD = x_ND[token_M]
    weight_M1 = weight_Nk.flatten()[order_M, None].to(x_ND.dtype)
    if weigh_input:
        x_MD = x_MD * weight_M1
    numbers_E = torch.arange(len(gate_up_EFD), device=x_ND.device)
    end_E = torch.searchsorted(expert_M, numbers_E, right=True)  # where each expert's block ends
    if isinstance(gate_up_EFD, nn.ModuleList) or isinstance(down_EDF, nn.ModuleList):
        out_MD = _loop(x_MD, end_E, _products(gate_up_EFD), _products(down_EDF))
    elif _can_group(x_MD, down_EDF):
        out_MD = _grouped(x_MD, end_E, gate_up_EFD, down_EDF)
    else:
        out_MD = _loop(x_MD, end_E, _products(gate_up_EFD), _products(down_EDF))
    if not weigh_input:
        out_MD = out_MD * weight_M1
    return out_MD[order_M.argsort()].view(N, k, x_ND.shape[1]).sum(1)


def _products(matrices_E: Tensor | nn.ModuleList) -> list[Product]:
    """The product with each expert's matrix."""
    if isinstance(matrices_E, nn.ModuleList):
        return [*matrices_E]
    # Not by indexing, whose backward pass would add up a whole stack for each expert.
    return [partial(F.linear, weight=matrix) for matrix in matrices_E.unbind()]


def _loop(x_MD: Tensor, end_E: Tensor, gate_up_E: Iterable[Product], down_E: Iterable[Product]
          ) -> Tensor:
    """One expert after the other, each on its block of tokens."""
    blocks = x_MD.split([end - begin for begin, end in pairwise([0, *end_E.tolist()])])
    out = []
    for block_mD, gate_up, down in zip(blocks, gate_up_E, down_E, strict=True):
        if len(block_mD):
            gate_mF, up_mF = gate_up(block_mD).chunk(2, dim=-1)
            out.append(down(F.silu(gate_mF) * up_mF))
    return torch.cat(out) if out else x_MD


def _grouped(x_MD: Tensor, end_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """All experts in two grouped matrix products, without waiting for the device."""
    dtype, ends_E = _product_dtype(x_MD), end_E.to(torch.int32)
    gate_up, down = (w.to(dtype).transpose(1, 2) for w in (gate_up_EFD, down_EDF))
    gate, up = F.grouped_mm(x_MD.to(dtype), gate_up, offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down, offs=ends_E)


def _can_group(x_MD: Tensor, down_EDF: Tensor) -> bool:
    """Whether PyTorch's grouped products take it, rows of a multiple of 16 bytes, and are quicker.

    On CUDA they are: one kernel, for bfloat16 from compute capability 8.0 on. On a CPU they are a
    loop too, but one that writes the gradients of all experts in place."""
    dtype = _product_dtype(x_MD)
    if not len(x_MD) or any(size * dtype.itemsize % 16 for size in down_EDF.shape[1:]):
        return False
    if x_MD.is_cuda:
        return (dtype == torch.bfloat16
                and torch.cuda.get_device_capability(x_MD.device) >= (8, 0))
    return dtype != torch.float64 and torch.is_grad_enabled() and down_EDF.requires_grad


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, which grouped ones ignore."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Experts(nn.Module):
    """E SwiGLU experts of width F, stacked: gate_up_proj [E, 2F, D] and down_proj [E, D, F], or
    `transposed`, [E, D, 2F] and [E, F, D], as Llama 4's files have them."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int,
                 transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        shapes = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.empty(experts, *(shape[::-1] if transposed else shape)))
            for shape in shapes)

    def forward(self, x_ND: Tensor, chosen_Nk: Tensor, weight_Nk: Tensor,
                weigh_input: bool = False) -> Tensor:
        gate_up, down = (w.transpose(1, 2) if self.transposed and isinstance(w, Tensor) else w
                         for w in (self.gate_up_proj, self.down_proj))
        return routed(x_ND, chosen_Nk, weight_Nk, gate_up, down, weigh_input)


class Balanced(nn.Module):
    """A router balanced without an auxiliary loss (DeepSeek V3, arXiv 2412.19437, section 2.1.2):
    a bias for each expert is added to its score for the top-k alone, not for its weight.

    The bias is a float32 buffer [E] with the name that files give it, `bias_name`. `forward` calls
    `count` with the experts it chose; training calls `balance` after each step.
    """

    bias_name = "expert_bias"
    tokens_per_expert: Tensor

    def add_bias(self, experts: int) -> None:
        """Register the bias, all zeros; called once, by __init__."""
        self.register_buffer(self.bias_name, torch.zeros(experts))
        self.tokens_per_expert = torch.zeros(experts, device="cpu")  # even when built on meta

    def count(self, chosen_Nk: Tensor) -> None:
        """Add to `tokens_per_expert`, in training mode."""
        if self.training:
            count_E = torch.bincount(chosen_Nk.flatten(), minlength=len(self.tokens_per_expert))
            self.tokens_per_expert = self.tokens_per_expert.to(count_E.device) + count_E

    def balance(self, load_E: Tensor, rate: float) -> None:
        """Move each expert's bias by `rate`, down if its load is above the mean, and count anew."""
        bias_E = self.get_buffer(self.bias_name)
        bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)
        self.tokens_per_expert.zero_()


class MoE(Experts, Balanced):
    """Vicugna's mixture: of E experts of width F each token uses `top_k`, chosen by the sigmoids of
    their logits, biased, and weighted by the sigmoids, normalised."""

    expert_bias: Tensor

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, top_k: int) -> None:
        super().__init__(hidden_size, intermediate_size, experts)
        self.add_bias(experts)
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, experts, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        x_ND = x_BTD.flatten(0, 1)
        score_NE = torch.sigmoid(self.router(x_ND).float())
        chosen_Nk = (score_NE + self.expert_bias).topk(self.top_k, dim=-1).indices
        weight_Nk = score_NE.gather(-1, chosen_Nk)
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        self.count(chosen_Nk)
        return super().forward(x_ND, chosen_Nk, weight_Nk).view_as(x_BTD)


class Router(nn.Linear):
    """Mixtral's router (arXiv 2401.04088): the `top_k` most probable of E experts, weighted by
    their probabilities, normalised.

    x [N, D] -> logits [N, E], chosen experts [N, k], float32 weights [N, k]."""

    def __init__(self, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(hidden_size, experts, bias=False)
        self.top_k = top_k

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        logits_NE = super().forward(x_ND)
        weight_Nk, chosen_Nk = logits_NE.float().softmax(-1).topk(self.top_k, dim=-1)
        return logits_NE, chosen_Nk, weight_Nk / weight_Nk.sum(-1, keepdim=True)


@contextmanager
def capture_router_logits(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which every `Router` of the network that runs inside the context appends its
    logits [N, E]."""
    captured: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, out: captured.append(out[0]))
             for module in network.modules() if isinstance(module, Router)]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()

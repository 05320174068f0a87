"""The experts' work against one token at a time; the balance of their load."""

import parity
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.models.layers import moe
from vicugna.models.layers.attention import Dense
from vicugna.models.layers.moe import Balanced, Experts, MoE, Router, capture_router_logits
from vicugna.training.batch import TrainingBatch
from vicugna.training.loss import Loss
from vicugna.training.objectives import balance_loss, next_token
from vicugna.training.trainer import balance_experts


def slow(x_ND, chosen_Nk, weight_Nk, gate_up_EFD, down_EDF, weigh_input=False):
    """By the definition, a token and an expert at a time."""
    rows = []
    for x, chosen, weights in zip(x_ND, chosen_Nk.tolist(), weight_Nk, strict=True):
        row = torch.zeros_like(x)
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = (gate_up_EFD[e] @ (x * weight if weigh_input else x)).chunk(2)
            row = row + down_EDF[e] @ (F.silu(gate) * up) * (1 if weigh_input else weight)
        rows.append(row)
    return torch.stack(rows) if rows else x_ND


def case(N=13, k=2, E=5, D=8, F_=16, seed=0, dtype=torch.float32):
    """Random inputs of `routed`, of which all but the choice want gradients."""
    torch.manual_seed(seed)
    chosen_Nk = torch.rand(N, E).topk(k).indices
    weight_Nk = torch.rand(N, k)
    leaves = [torch.randn(N, D), weight_Nk, torch.randn(E, 2 * F_, D), torch.randn(E, D, F_)]
    x, weight, gate_up, down = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    return x, chosen_Nk, weight, gate_up, down


def outcome(function, inputs, **how):
    """The value and the gradients of every input that has one."""
    leaves = [x for x in inputs if x.requires_grad]
    value = function(*inputs, **how)
    wave = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return [value, *torch.autograd.grad(value, leaves, wave)]


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 12), E=st.integers(1, 7), seed=st.integers(0, 99), late=st.booleans(),
       data=st.data())
def test_experts_equal_the_definition(N, E, seed, late, data):
    inputs = case(N, data.draw(st.integers(1, E)), E, 4, 3, seed)
    assert_close(outcome(moe.routed, inputs, weigh_input=late),
                 outcome(slow, inputs, weigh_input=late), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_grouped_products_equal_the_loop(weigh_input, dtype, near, monkeypatch):
    """What runs on a GPU, run here: values and gradients; experts 0, 3 and the last get nothing."""
    used = torch.tensor([1, 2, 4, 5, 6, 7])
    x, _, weight, gate_up, down = case(N=24, E=9, dtype=dtype)
    inputs = (x, used[case(N=24, E=6)[1]], weight, gate_up, down)
    due, got = [], []
    for group, values in ((False, due), (True, got)):
        monkeypatch.setattr(moe, "_can_group", lambda *_, group=group: group)
        values += outcome(moe.routed, inputs, weigh_input=weigh_input)
    for a, b in zip(got, due, strict=True):
        assert_close(a, b, atol=near * b.abs().max().item(), rtol=0)
    for gradient in got[-2:]:
        assert not gradient[[0, 3, 8]].any() and gradient[used].flatten(1).any(1).all()


@pytest.mark.parametrize(("D", "F", "dtype", "training", "grouped"), [
    (8, 16, torch.bfloat16, True, True), (4, 8, torch.float32, True, True),
    (8, 16, torch.bfloat16, False, False), (4, 8, torch.bfloat16, True, False),
    (8, 6, torch.float32, True, False), (8, 8, torch.float64, True, False)])
def test_which_products_are_grouped(D, F, dtype, training, grouped):
    """On a CPU: those of training, in rows of 16 bytes, as far as PyTorch has them."""
    down = torch.zeros(2, D, F, dtype=dtype, requires_grad=True)
    with torch.set_grad_enabled(training):
        assert moe._can_group(torch.zeros(4, D, dtype=dtype), down) is grouped
    assert not moe._can_group(torch.zeros(4, D, dtype=dtype), down.detach())
    assert not moe._can_group(torch.zeros(0, D, dtype=dtype), down)


def test_stacks_may_be_views():
    """Llama 4 stores its experts transposed."""
    x, chosen, weight, gate_up, down = case()
    stored = gate_up.detach().transpose(1, 2).contiguous().requires_grad_()
    got = outcome(lambda *a: moe.routed(*a[:3], a[3].transpose(1, 2), a[4]),
                  (x, chosen, weight, stored, down))
    due = outcome(moe.routed, (x, chosen, weight, gate_up, down))
    assert_close(got[3].transpose(1, 2), due[3])
    assert_close(got[:3], due[:3])


def test_an_expert_without_tokens_has_no_gradient():
    x, chosen, weight, gate_up, down = case(E=6)
    chosen = torch.tensor([[1, 4]]).expand(13, 2)
    *_, up_gradient, down_gradient = outcome(moe.routed, (x, chosen, weight, gate_up, down))
    for gradient in (up_gradient, down_gradient):
        assert gradient.flatten(1).any(1).tolist() == [False, True, False, False, True, False]


def test_no_tokens_at_all():
    x, chosen, weight, gate_up, down = case(N=0)
    assert moe.routed(x, chosen, weight, gate_up, down).shape == (0, 8)


def test_bfloat16_stays_bfloat16():
    x, chosen, weight, gate_up, down = case(dtype=torch.bfloat16)
    assert moe.routed(x, chosen, weight.float(), gate_up, down).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        made = moe.routed(x, chosen, weight, gate_up.float(), down.float())
    assert made.dtype == torch.bfloat16


def test_vicugnas_mixture_is_its_definition():
    torch.manual_seed(0)
    layer = MoE(16, 24, 6, 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.expert_bias.normal_()
    x = torch.randn(30, 16)
    score = torch.sigmoid(layer.router(x).float())
    chosen = (score + layer.expert_bias).topk(3, dim=-1).indices
    weight = score.gather(-1, chosen)
    weight = weight / weight.sum(-1, keepdim=True)
    expert, order = chosen.flatten().sort(stable=True)
    out = []
    for e, block in enumerate(x[order // 3].split(torch.bincount(expert, minlength=6).tolist())):
        gate, up = F.linear(block, layer.gate_up_proj[e]).chunk(2, dim=-1)
        out.append(F.linear(F.silu(gate) * up, layer.down_proj[e]))
    due = torch.zeros_like(x).index_add(0, order // 3,
                                        torch.cat(out) * weight.flatten()[order, None])
    assert_close(layer(x.view(2, 15, 16)).view(30, 16), due)
    assert list(layer.state_dict()) == ["gate_up_proj", "down_proj", "expert_bias", "router.weight"]


def test_the_bias_chooses_and_never_weighs():
    class Named(Balanced):
        bias_name = "e_score_correction_bias"

    router = Named()
    router.add_bias(4)
    assert list(router.state_dict()) == ["e_score_correction_bias"]
    router.train()
    router.count(torch.tensor([[0, 1], [0, 2], [0, 1]]))
    router.count(torch.tensor([[0, 1]]))
    assert router.tokens_per_expert.tolist() == [4, 3, 1, 0]
    balance_experts(router, Ranks(), 0.5)
    assert router.e_score_correction_bias.tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert router.tokens_per_expert.tolist() == [0, 0, 0, 0]
    router.eval()
    router.count(torch.tensor([[0, 1]]))
    assert not router.tokens_per_expert.any()


@settings(max_examples=30, deadline=None)
@given(L=st.integers(1, 4), N=st.integers(1, 20), E=st.integers(1, 8), seed=st.integers(0, 99),
       data=st.data())
def test_the_balance_loss_is_transformers(L, N, E, seed, data):
    k = data.draw(st.integers(1, E))
    logits = torch.randn(L, N, E, generator=torch.Generator().manual_seed(seed)) * 3
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=N, max_size=N)))
    real[0] = True
    due = load_balancing_loss_func(tuple(logits), E, k, real[None].long())
    assert_close(balance_loss(logits[:, real], k), due, atol=1e-5, rtol=1e-5)


def test_the_balance_loss_is_least_where_the_load_is_even():
    even = torch.eye(4).repeat(3, 1)[None] * 9
    uneven = torch.eye(4)[:1].expand(12, 4)[None] * 9
    assert balance_loss(even, 1) == pytest.approx(1.0, abs=1e-3)
    assert balance_loss(uneven, 1) > 3.9
    assert balance_loss(even[:, :0], 1) == 0


def mixture(coefficient=1.0):
    network = models.build({
        "model_type": "mixtral", "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_local_experts": 4,
        "initializer_range": 0.3, "router_aux_loss_coef": coefficient})
    models.initialise(network, seed=0)
    return network.train()


def loss_of(network, rows=slice(None), weights=None):
    tokens = parity.random_tokens(4, 11)[rows]
    positions = torch.arange(10).expand(len(tokens), -1)
    weights = torch.ones(len(tokens), 10) if weights is None else weights[rows]
    batch = TrainingBatch(tokens[:, :-1], positions, tokens[:, 1:], weights)
    return Loss(network, next_token, "fp32")(batch)


def test_router_logits_are_captured_once_each_and_hooks_removed():
    network = mixture()
    tokens, positions = parity.random_tokens(2, 5), torch.arange(5).expand(2, -1)
    with capture_router_logits(network) as captured:
        network(tokens, positions, Dense())
    network(tokens, positions, Dense())
    assert [logits.shape for logits in captured] == [(10, 4), (10, 4)]
    with pytest.raises(ZeroDivisionError), capture_router_logits(network):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in network.modules())


@torch.no_grad()
def test_accumulated_rows_count_the_balance_loss_once():
    """Of two halves of a batch the mean is taken, not the sum."""
    network, plain = mixture(1.0), mixture(0.0)
    parts = [slice(0, 2), slice(2, 4)]
    extra = [float(loss_of(network, part) - loss_of(plain, part)) / 20 for part in parts]
    together = float(sum(loss_of(network, part) for part in parts)
                     - sum(loss_of(plain, part) for part in parts)) / 40
    assert together == pytest.approx(sum(extra) / 2, rel=1e-4)
    assert all(2 * 0.9 < part < 8 for part in extra)  # k when even, at most E


def test_padding_has_no_part_in_the_balance_loss():
    """Tokens after a row's last target: whatever they are, the loss is the same."""
    network = mixture()
    weights = torch.ones(4, 10)
    weights[0, 6:], weights[1] = 0, 0
    tokens, targets = parity.random_tokens(4, 11), parity.random_tokens(4, 10)
    positions, values = torch.arange(10).expand(4, -1), []
    for filler in (3, 50):
        tokens[0, 6:10], tokens[1, :10] = filler, filler
        batch = TrainingBatch(tokens[:, :-1], positions, targets, weights)
        values.append(Loss(network, next_token, "fp32")(batch))
    assert_close(*values)
    loss_of(network, weights=torch.zeros(4, 10)).backward()  # nothing to learn: no NaN
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_the_balance_loss_evens_the_load():
    """All tokens have a direction in common, so that two experts of the first layer get all."""
    least = []
    for coefficient in (0.0, 1.0):
        network = mixture(coefficient)
        with torch.no_grad():
            network.model.embed_tokens.weight += torch.linspace(-1, 1, 16)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(40):
            with capture_router_logits(network) as captured:
                loss_of(network).backward()
            optimiser.step()
            optimiser.zero_grad()
        least.append(captured[0].topk(2).indices.flatten().bincount(minlength=4).min().item())
    assert least[0] <= 2 and least[1] >= 6  # of 20 if it were even


def test_every_parameter_is_initialised_by_the_seed_alone():
    one, two = mixture(), mixture()
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.unique().numel() > p.numel() // 2 or "norm" in name, name
    router, experts = Router(16, 4, 2), Experts(16, 24, 4)
    assert router.weight.shape == (4, 16) and experts.gate_up_proj.shape == (4, 48, 16)

"""DeepSeek V3 against transformers' DeepseekV3ForCausalLM on random weights."""


import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import vicugna
from vicugna import models
from vicugna.engine.pages import layer_shapes
from vicugna.errors import VicugnaError
from vicugna.models import deepseek_v3
from vicugna.models.layers.attention import Dense

# rms_norm_eps is large, and no two widths are equal, so that a mistaken one shows.
TINY = {**parity.TINY, "num_key_value_heads": 4, "rms_norm_eps": 1e-2, "q_lora_rank": 24,
        "kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "n_routed_experts": 16, "moe_intermediate_size": 20, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
CASES = {
    "low-rank queries": {},
    "full-rank queries": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases, full-rank": {"attention_bias": True, "q_lora_rank": None},
    "rope on halves": {"rope_interleave": False},
    "wide values": {"v_head_dim": 32, "qk_nope_head_dim": 4},
    "one group": {"n_group": 1, "topk_group": 1},
    "groups of two": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 5},
    "all experts": {"n_group": 2, "num_experts_per_tok": 16},
    "more experts than the groups have": {"topk_group": 1, "num_experts_per_tok": 6},
    "scores as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 7},
    "two shared experts": {"n_shared_experts": 2},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 2560},
    "yarn, unequal scales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, cosine scaled": {"rope_parameters": {**YARN, "mscale_all_dim": 0, "truncate": False}},
    "linear rope, sharpened": {"rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}},
}


def config(**changes):
    return DeepseekV3Config(**{**TINY, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    """Also beyond 8K and 32K positions, padded, and in the form that caches remember."""
    theirs, ours = parity.pair(config(**changes))
    tokens = parity.random_tokens(2, 70)
    for first in (0, 9000, 40000):
        parity.agree_uncached(theirs, ours, tokens, first)
        parity.agree_cached(theirs, ours, tokens[:, :12], [7, 1, 1, 3], first)
    parity.agree_padded(theirs, ours, tokens, [0, 23], [60, 1, 9])


@pytest.fixture(scope="module")
def tiny():
    return parity.pair(config(rope_parameters=YARN))


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=5), pads=st.integers(0, 30))
def test_any_split_over_a_cache_equals_one_call(tiny, parts, pads):
    theirs, ours = tiny
    pads = min(pads, sum(parts) - 1)
    parity.agree_padded(theirs, ours, parity.random_tokens(2, sum(parts)), [pads, 0], parts)


def test_training_meets_the_keys_and_values_of_every_head(tiny):
    """The form of the sum that takes fewer operations when nothing is remembered."""
    class Spy(Dense):
        def __call__(self, layer, q, k, v, span, scale):
            assert q.shape == k.shape == (1, 9, 4, 12 + 8) and v.shape == (1, 9, 4, 10)
            return super().__call__(layer, q, k, v, span, scale)

    parity.logits_of(tiny[1], parity.random_tokens(1, 9), attend=Spy())


def test_the_cache_holds_one_latent_and_one_key_a_token(tiny):
    for layer in layer_shapes(tiny[1]):
        assert (layer.heads, layer.key, layer.value) == (1, 0, 18 + 8)  # no keys beside the values


def test_packed_documents_equal_documents_alone(tiny):
    ours, lengths = tiny[1], [5, 1, 17, 9]
    tokens = parity.random_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = parity.logits_of(ours, tokens, positions, Dense(positions)).split(lengths, 1)
    for part, document in zip(packed, tokens.split(lengths, 1), strict=True):
        parity.near(part, parity.logits_of(ours, document))


@pytest.mark.parametrize("changes", [{}, CASES["biases, full-rank"],
                                     CASES["yarn, unequal scales"] | {"rope_interleave": False},
                                     CASES["scores as they are"]])
def test_gradients_equal_transformers(changes):
    parity.agree_gradients(*parity.pair(config(**changes)), parity.random_tokens(2, 40))


def routers_of(network):
    return [layer.mlp.gate for layer in network.model.layers if hasattr(layer.mlp, "gate")]


def test_ties_are_broken_as_by_transformers():
    """Experts that are alike in score and bias: all in one layer, pairs and groups in another."""
    theirs = parity.reference(config())
    alike, pairs = routers_of(theirs)
    with torch.no_grad():
        alike.weight.zero_()
        alike.e_score_correction_bias.zero_()
        pairs.weight.copy_(pairs.weight[::2].repeat_interleave(2, 0))
        pairs.weight[8:] = pairs.weight[:8]
        pairs.e_score_correction_bias.fill_(0.5)
    parity.agree_uncached(theirs, parity.converted(theirs), parity.random_tokens(2, 60))


def test_an_expert_without_tokens_has_no_gradient_and_harms_none():
    theirs = parity.reference(config())
    for router in routers_of(theirs):
        router.e_score_correction_bias[5] = -100
    ours = parity.converted(theirs).train()
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 40))
    for router in routers_of(ours):
        assert router.tokens_per_expert[5] == 0
    assert not ours.model.layers[1].mlp.experts.gate_up_proj.grad[5].any()


def test_training_counts_the_tokens_of_each_expert():
    theirs, ours = parity.pair(config())
    chosen = []
    for router in routers_of(theirs):
        router.register_forward_hook(lambda module, given, made: chosen.append(made[2]))
    tokens = parity.random_tokens(2, 50)
    parity.agree_uncached(theirs, ours, tokens)
    assert not any(router.tokens_per_expert.any() for router in routers_of(ours))
    parity.logits_of(ours.train(), tokens)
    for router, theirs_Nk in zip(routers_of(ours), chosen, strict=True):
        assert torch.equal(router.tokens_per_expert.long(), theirs_Nk.flatten().bincount(
            minlength=16))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_token_uses_experts_of_few_groups_and_the_bias_weighs_nothing(data):
    groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    router = deepseek_v3.Router(deepseek_v3.Config(
        hidden_size=16, n_routed_experts=groups * size, n_group=groups, topk_group=kept,
        num_experts_per_tok=k, routed_scaling_factor=2.0))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias)
    x_ND = torch.randn(7, 16)
    chosen_Nk, weight_Nk = router(x_ND)
    score_NE = (x_ND @ router.weight.T).sigmoid()
    for chosen, weight, score in zip(chosen_Nk, weight_Nk, score_NE, strict=True):
        assert len(set(chosen.tolist())) == k
        assert len(set((chosen // size).tolist())) <= kept
        assert torch.allclose(weight, 2 * score[chosen] / score[chosen].sum())


def test_routing_is_float32_whatever_the_precision_of_the_rest():
    """Few bits of a score would choose other experts."""
    torch.manual_seed(0)
    router = deepseek_v3.Router(deepseek_v3.Config.from_dict(TINY))
    router.weight = torch.nn.Parameter(torch.randn(16, 64).bfloat16())
    x_ND = torch.randn(200, 64).bfloat16()
    low = router(x_ND)
    router.weight = torch.nn.Parameter(router.weight.float())
    due = router(x_ND.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x_ND.float())
    for got in (low, mixed):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, due, strict=True))


def test_initialise_fills_every_parameter():
    networks = [models.build(config(attention_bias=True).to_dict()) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        models.initialise(network, seed=3)
    for (name, a), b in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a == 1).all() if "norm" in name else (a == 0).all() if "bias" in name else (
            0.01 < a.std() < 0.2), name


def parameters(c):
    """The number of parameters by formula."""
    D, H, R, P = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    K, bias = c.qk_nope_head_dim + P, c.attention_bias
    q = D * H * K if c.q_lora_rank is None else c.q_lora_rank * (D + bias + 1 + H * K)
    kv = (D + bias) * (R + P) + R + R * H * (c.qk_nope_head_dim + c.v_head_dim)
    attention = q + kv + H * c.v_head_dim * D + bias * D
    dense = min(c.first_k_dense_replace, c.num_hidden_layers)
    experts = 3 * D * c.moe_intermediate_size * (c.n_routed_experts + c.n_shared_experts)
    return (c.num_hidden_layers * (attention + 2 * D) + dense * 3 * D * c.intermediate_size
            + (c.num_hidden_layers - dense) * (experts + c.n_routed_experts * D)
            + D + (2 - c.tie_word_embeddings) * c.vocab_size * D)


def built(c):
    with torch.device("meta"):
        return sum(p.numel() for p in deepseek_v3.Network(c).parameters())


def test_the_published_model_has_671_billion_parameters():
    c = deepseek_v3.Config()
    assert parameters(c) == built(c) == 671_026_404_352


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_parameters_by_formula_equal_those_built_and_configs_come_back(data):
    def draw(least, most):
        return data.draw(st.integers(least, most))

    groups, heads = draw(1, 3), draw(1, 4)
    c = deepseek_v3.Config(
        vocab_size=draw(1, 50), hidden_size=draw(1, 40), intermediate_size=draw(1, 40),
        num_hidden_layers=draw(1, 5), num_attention_heads=heads, num_key_value_heads=heads,
        q_lora_rank=data.draw(st.none() | st.integers(1, 20)), kv_lora_rank=draw(1, 20),
        qk_nope_head_dim=draw(1, 20), qk_rope_head_dim=8, head_dim=8, v_head_dim=draw(1, 20),
        first_k_dense_replace=draw(0, 6), moe_intermediate_size=draw(1, 30),
        n_shared_experts=draw(1, 3), n_routed_experts=groups * 3, n_group=groups,
        topk_group=groups, num_experts_per_tok=draw(1, 3),
        attention_bias=data.draw(st.booleans()), norm_topk_prob=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()))
    assert built(c) == parameters(c)
    assert deepseek_v3.Config.from_dict(c.to_dict()) == c
    theirs = DeepseekV3Config(**c.to_dict())
    assert deepseek_v3.Config.from_dict(theirs.to_dict()) == c


PUBLISHED = {  # config.json of DeepSeek-R1, without its quantisation
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280}


def test_both_forms_of_the_published_config_mean_the_same():
    c = deepseek_v3.Config.from_dict(PUBLISHED)
    assert c.rope_scaling == {**PUBLISHED["rope_scaling"]} and c.rope_theta == 10000.0
    written = c.to_dict()
    ignored = ("ep_size", "use_cache", "bos_token_id", "eos_token_id", "attention_dropout")
    assert {key: written[key] for key in PUBLISHED if key not in ignored} == {
        key: value for key, value in PUBLISHED.items() if key not in ignored}
    nested = DeepseekV3Config(**PUBLISHED).to_dict()
    assert nested["rope_parameters"]["rope_type"] == "yarn" and "rope_scaling" not in nested
    again = deepseek_v3.Config.from_dict(nested)
    assert again.rope_scaling == {**c.rope_scaling, "rope_type": "yarn"}
    assert {**again.to_dict(), "rope_scaling": None} == {**written, "rope_scaling": None}
    assert DeepseekV3Config(**written, ep_size=1).to_dict() == nested


def test_null_and_absent_keys_mean_what_they_do_to_transformers():
    null = dict.fromkeys(("q_lora_rank", "norm_topk_prob", "rope_interleave"))
    c, theirs = deepseek_v3.Config.from_dict(null), DeepseekV3Config(**null)
    assert (c.q_lora_rank, c.norm_topk_prob, c.rope_interleave) == (None, False, False)
    assert not (theirs.q_lora_rank or theirs.norm_topk_prob or theirs.rope_interleave)
    assert deepseek_v3.Config.from_dict({}) == deepseek_v3.Config() == (
        deepseek_v3.Config.from_dict(DeepseekV3Config().to_dict()))
    assert deepseek_v3.Config.from_dict({"num_mtp_layers": 2}).num_nextn_predict_layers == 2


BAD = {
    "router of V2": ({"scoring_func": "softmax"}, "scoring_func"),
    "greedy router": ({"topk_method": "group_limited_greedy"}, "topk_method"),
    "sparse mixtures": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "act": ({"hidden_act": "gelu"}, "gelu"),
    "shared keys": ({"num_key_value_heads": 2}, "num_key_value_heads"),
    "head_dim": ({"head_dim": 16}, "qk_rope_head_dim is 8"),
    "odd rope": ({"qk_rope_head_dim": 7, "head_dim": 7}, "odd"),
    "uneven groups": ({"n_group": 3}, "n_group is 3"),
    "groups of one": ({"n_group": 16}, "n_group is 16"),
    "too many groups": ({"topk_group": 5}, "topk_group is 5"),
    "too many experts": ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17"),
    "no rank": ({"q_lora_rank": 0}, "q_lora_rank is 0"),
    "negative": ({"first_k_dense_replace": -1}, "at least 0"),
    "rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic"),
    "rope value": ({"rope_scaling": {**YARN, "attention_factor": "wide"}}, "impossible"),
    "part of a head": ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial"),
}


@pytest.mark.parametrize("changes,words", BAD.values(), ids=BAD)
def test_impossible_configs_are_named(changes, words):
    good = {**TINY, "model_type": "deepseek_v3"}
    models.build(good)
    with pytest.raises(VicugnaError, match=words):
        models.build({**good, **changes})


def test_round_trip_through_files(tmp_path):
    parity.agree_round_trip(parity.reference(config(rope_parameters=YARN)), tmp_path)


def test_layers_that_predict_further_tokens_are_kept(tmp_path):
    """Two more layers in the files: config.json tells of one, so the other is not expected."""
    theirs = parity.reference(config(num_nextn_predict_layers=1))
    theirs.save_pretrained(tmp_path / "a")
    tensors = parity.tensors_of(tmp_path / "a")
    further = {f"model.layers.3.{name}": torch.randn(shape) for name, shape in {
        "enorm.weight": (64,), "eh_proj.weight": (64, 128), "shared_head.head.weight": (97, 64),
        "mlp.experts.15.down_proj.weight": (64, 20)}.items()}
    save_file(tensors | further, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    model = vicugna.load(tmp_path / "a")
    parity.near(model.logits(parity.random_tokens(1, 20)),
                parity.logits_of(parity.converted(theirs), parity.random_tokens(1, 20)))
    model.save(tmp_path / "b")
    again, due = parity.tensors_of(tmp_path / "b"), tensors | further
    assert again.keys() == due.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in due.items())
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "b")
    stranger = {"model.layers.4.enorm.weight": torch.ones(64)}
    save_file(tensors | stranger, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VicugnaError, match=r"unexpected model\.layers\.4\.enorm\.weight"):
        vicugna.load(tmp_path / "a")

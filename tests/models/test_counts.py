"""Counts read off networks, against formulas in the letters of the architecture, and against the
sizes that were published."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import models
from vicugna.cli import planning
from vicugna.engine.pages import layer_shapes
from vicugna.errors import VicugnaError
from vicugna.models import counts
from vicugna.models.layers.attention import Dense
from vicugna.models.layers.mask import Span

Config = dict[str, Any]
Sizes = tuple[int, int]  # total, and active for one token of text


@st.composite
def shapes(draw: st.DrawFn) -> Config:
    """The keys that every architecture has."""
    groups = draw(st.integers(1, 3))
    return {"vocab_size": draw(st.integers(8, 40)), "hidden_size": 4 * draw(st.integers(1, 6)),
            "intermediate_size": draw(st.integers(1, 30)),
            "num_hidden_layers": draw(st.integers(1, 5)), "num_key_value_heads": groups,
            "num_attention_heads": groups * draw(st.integers(1, 3)),
            "head_dim": 2 * draw(st.integers(1, 6)), "tie_word_embeddings": draw(st.booleans())}


def around(c: Config, layers: Sizes) -> Sizes:
    """Embeddings, head and last norm, beside what is in the layers."""
    D = c["hidden_size"]
    beside = c["vocab_size"] * D * (1 if c["tie_word_embeddings"] else 2) + D
    return layers[0] + beside, layers[1] + beside


def grouped(c: Config, qkv_bias: bool = False, o_bias: bool = False) -> int:
    """Grouped-query attention and the two norms of a layer."""
    D, H, G, K = (c[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads",
                                     "head_dim"))
    return (D * K * (2 * H + 2 * G) + qkv_bias * K * (H + 2 * G) + o_bias * D) + 2 * D


def swiglu(D: int, F: int, bias: bool = False) -> int:
    return 3 * D * F + bias * (2 * F + D)


def mixture(D: int, F: int, experts: int, chosen: int) -> Sizes:
    """Router and experts."""
    return D * experts + experts * swiglu(D, F), D * experts + chosen * swiglu(D, F)


def repeat(c: Config, attention: int, feed_forward: Sizes) -> Sizes:
    """All layers alike."""
    L = c["num_hidden_layers"]
    return around(c, (L * (attention + feed_forward[0]), L * (attention + feed_forward[1])))


def llama(data: st.DataObject, c: Config) -> Sizes:
    c |= {"attention_bias": data.draw(st.booleans()), "mlp_bias": data.draw(st.booleans())}
    F = swiglu(c["hidden_size"], c["intermediate_size"], c["mlp_bias"])
    return repeat(c, grouped(c, c["attention_bias"], c["attention_bias"]), (F, F))


def mistral(data: st.DataObject, c: Config) -> Sizes:
    F = swiglu(c["hidden_size"], c["intermediate_size"])
    return repeat(c, grouped(c), (F, F))


def mistral3(data: st.DataObject, c: Config) -> Sizes:
    """Without an image encoder, of which test_mistral3.py counts the parameters."""
    text, kind = dict(c), data.draw(st.sampled_from(["mistral", "ministral3"]))
    c.clear()
    c |= {"text_config": {**text, "model_type": kind}}
    return mistral(data, text)


def qwen2(data: st.DataObject, c: Config) -> Sizes:
    F = swiglu(c["hidden_size"], c["intermediate_size"])
    return repeat(c, grouped(c, qkv_bias=True), (F, F))


def mixtral(data: st.DataObject, c: Config) -> Sizes:
    E = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, E))
    c |= {"num_local_experts": E, "num_experts_per_tok": k}
    return repeat(c, grouped(c), mixture(c["hidden_size"], c["intermediate_size"], E, k))


def vicugna(data: st.DataObject, c: Config) -> Sizes:
    E, every = data.draw(st.integers(0, 5)), data.draw(st.integers(2, 4))
    k = data.draw(st.integers(1, max(E, 1)))
    c |= {"num_experts": E, "num_experts_per_tok": k, "global_every": every,
          "conv_width": data.draw(st.integers(1, 5))}
    D, F, L = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    global_layers = sum(n % every == every - 2 for n in range(L)) * c["num_attention_heads"]
    layer = grouped(c) + c["conv_width"] * D + 2 * c["head_dim"]
    total, active = repeat(c, layer, mixture(D, F, E, k) if E else (swiglu(D, F),) * 2)
    return total + global_layers, active + global_layers


def deepseek_v3(data: st.DataObject, c: Config) -> Sizes:
    draw, D, H = data.draw, c["hidden_size"], c["num_attention_heads"]
    L, groups, per_group = c["num_hidden_layers"], draw(st.integers(1, 3)), draw(st.integers(2, 3))
    E, kept = groups * per_group, draw(st.integers(1, groups))
    k, shared = draw(st.integers(1, kept * per_group)), draw(st.integers(1, 2))
    R, P, N, U = (2 * draw(st.integers(1, 5)) for _ in range(4))
    q, bias, F = draw(st.sampled_from([None, 6])), draw(st.booleans()), draw(st.integers(1, 9))
    dense = draw(st.integers(0, L))
    c |= {"q_lora_rank": q, "kv_lora_rank": R, "qk_rope_head_dim": P, "qk_nope_head_dim": N,
          "v_head_dim": U, "n_routed_experts": E, "n_shared_experts": shared, "n_group": groups,
          "topk_group": kept, "num_experts_per_tok": k, "moe_intermediate_size": F,
          "first_k_dense_replace": dense, "attention_bias": bias, "head_dim": P,
          "num_key_value_heads": H}
    queries = D * H * (N + P) if q is None else D * q + q + q * H * (N + P) + bias * q
    attention = (queries + D * (R + P) + bias * (R + P) + R + R * H * (N + U)
                 + H * U * D + bias * D + 2 * D)
    every = L * attention + dense * swiglu(D, c["intermediate_size"])
    every += (L - dense) * shared * swiglu(D, F)
    experts = mixture(D, F, E, k)
    return around(c, (every + (L - dense) * experts[0], every + (L - dense) * experts[1]))


def llama4_text(data: st.DataObject, c: Config) -> Sizes:
    E, step = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    k, bias = data.draw(st.integers(1, E)), data.draw(st.booleans())
    c |= {"num_local_experts": E, "num_experts_per_tok": k, "interleave_moe_layer_step": step,
          "intermediate_size_mlp": data.draw(st.integers(1, 20)), "attention_bias": bias}
    D, F, L = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    mixtures = L // step
    every = L * grouped(c, bias, bias) + mixtures * swiglu(D, F)
    every += (L - mixtures) * swiglu(D, c["intermediate_size_mlp"])
    experts = mixture(D, F, E, k)
    return around(c, (every + mixtures * experts[0], every + mixtures * experts[1]))


def llama4(data: st.DataObject, c: Config) -> Sizes:
    text = dict(c)
    total, active = llama4_text(data, text)
    C, L, patch, side = 16 * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 3, 4
    I, out = 4 * C, data.draw(st.integers(1, 9))  # noqa: E741 - the encoder's inner width
    vision = {"model_type": "llama4_vision_model", "hidden_size": C, "intermediate_size": I,
              "num_hidden_layers": L, "num_attention_heads": 2, "image_size": patch * side,
              "patch_size": patch, "pixel_shuffle_ratio": 0.5, "projector_input_dim": out,
              "projector_output_dim": out, "vision_output_dim": out}
    c.clear()
    c |= {"text_config": {**text, "model_type": "llama4_text"}, "vision_config": vision,
          "tie_word_embeddings": text["tie_word_embeddings"]}
    layer = 4 * (C * C + C) + 2 * C * I + I + C + 4 * C
    encoder = 3 * patch**2 * C + C + (side**2 + 1) * C + 4 * C + L * layer
    return total + encoder + 4 * C * out + out * out + out * text["hidden_size"], active


FORMULAS: dict[str, Callable[[st.DataObject, Config], Sizes]] = {
    "ministral": mistral, "ministral3": mistral,
    **{f.__name__: f for f in (llama, mistral, mistral3, qwen2, mixtral, vicugna, deepseek_v3,
                               llama4_text, llama4)}}


@cache
def known(name: str) -> counts.Counts:
    return counts.count(planning.subject(name).config)


def test_every_architecture_has_a_formula() -> None:
    assert set(FORMULAS) == set(models.ARCHITECTURES)


@pytest.mark.parametrize("kind", FORMULAS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), config=shapes())
def test_parameters_by_formula_and_by_construction(kind: str, data: st.DataObject,
                                                   config: Config) -> None:
    sizes = FORMULAS[kind](data, config)
    config["model_type"] = kind
    made = counts.count(config)
    assert (made.total, made.active) == sizes
    built = models.build(config)
    assert made.total == sum(p.numel() for p in built.parameters())
    assert len(made.layers) == len(built.model.layers)


PUBLISHED = {  # exact sizes are those of the safetensors files on the Hub
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "llama-4-scout": 108_641_793_536, "llama-4-maverick": 401_583_781_376,
    "mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo": 12_247_782_400, "mistral-small": 23_572_403_200,
    "mistral-small-3.1": 24_011_361_280,
    "mixtral-8x7b": 46_702_792_704, "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352, "qwen2-7b": 7_615_616_512}
STATED = {  # billions, total and active, as announced; DeepSeek's leave out the input embeddings
    "llama-3.1-8b": (8.03, 8.03), "llama-3.1-70b": (70.6, 70.6), "llama-3.1-405b": (405.85, 405.85),
    "llama-4-scout": (109, 17), "llama-4-maverick": (401.6, 17), "mixtral-8x7b": (46.7, 12.9),
    "mistral-small-3.1": (24.0, 23.57),
    "mixtral-8x22b": (141, 39), "deepseek-v3": (671, 37), "behemoth": (2000, 288)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    assert known(name).total == PUBLISHED[name]


@pytest.mark.parametrize("name", STATED)
def test_stated_sizes(name: str) -> None:
    made = known(name)
    active = made.multiplied if name.startswith("deepseek") else made.active
    total, stated = STATED[name]
    assert made.total == pytest.approx(total * 1e9, rel=0.005)
    assert active == pytest.approx(stated * 1e9, rel=0.012)


@pytest.mark.parametrize(("name", "kept", "full"), [
    ("llama-3.1-8b", 2 * 32 * 8 * 128, 32),
    ("mistral-7b", 2 * 32 * 8 * 128, 0),
    ("llama-4-scout", 2 * 48 * 8 * 128, 12),
    ("deepseek-v3", 61 * (512 + 64), 61)])
def test_cache_elements(name: str, kept: int, full: int) -> None:
    """All layers grow up to their window; only those with full attention grow on."""
    made = known(name)
    assert made.cache_elements(100) == kept * 100
    layers = len(made.layers)
    growth = made.cache_elements(2_000_000) - made.cache_elements(1_000_000)
    assert growth == kept // layers * full * 1_000_000


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 60), reach=st.integers(1, 20), chunked=st.booleans())
def test_mean_keys(tokens: int, reach: int, chunked: bool) -> None:
    """As many as `Dense` attends to, averaged over the tokens of a sequence."""
    span = Span(chunk=reach) if chunked else Span(window=reach)
    layer = counts.LayerCost(span, flops=1, cached_flops=1, cache_elements=1)
    q = torch.zeros(1, tokens, 1, 2)  # equal scores: the weight of each key is 1 / number of keys
    values = torch.eye(tokens)[None, :, None]
    weights = Dense()(0, q, q, values, span)[0, :, 0]
    total = sum(1 / row[row > 0].max().item() for row in weights)
    assert layer.mean_keys(tokens) == pytest.approx(total / tokens)


@pytest.mark.parametrize("config", [
    {"model_type": "llama"}, {"model_type": "vicugna", "conv_width": 4},
    {"model_type": "deepseek_v3", "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
     "v_head_dim": 4, "q_lora_rank": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
     "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}])
def test_cache_elements_are_those_of_the_engine(config: Config) -> None:
    """The engine's blocks hold what was counted, token for token."""
    config = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 4, "sliding_window": 512, **config}
    network, made = models.build(config).eval(), counts.count(config)
    models.initialise(network, 0)
    held = sum(layer.heads * (layer.key + layer.value) for layer in layer_shapes(network))
    assert 7 * held == made.cache_elements(7)


def test_flops_are_two_a_parameter_and_attention() -> None:
    made = known("llama-3.1-8b")
    assert made.multiplied == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    attention = 32 * 2 * 32 * (128 + 128)  # of one token to one other
    assert made.flops(8192) == 2 * made.multiplied + attention * 8193 / 2
    assert made.decode_flops(8192) == 2 * made.multiplied + attention * 8192


def test_experts_read_by_a_batch() -> None:
    """One token reads its own; many read all."""
    made = known("mixtral-8x7b")
    one, two, some, many = map(made.weights_read, (1, 2, 16, 1000))
    assert one == pytest.approx(made.multiplied) and one < two < some < many
    assert many == pytest.approx(made.multiplied + made.routed * (1 - made.share))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
    ({"num_local_experts": 10**9}, "num_local_experts is 1,000,000,000"),
    ({"hidden_size": 2**62, "head_dim": 2}, "no network can be built"),
    ({"model_type": "lama"}, "Did you mean 'llama'"),
    ({"vocab_size": None}, "missing vocab_size")])
def test_impossible_configs(changes: Config, message: str) -> None:
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(VicugnaError, match=message):
        counts.count({**config, **changes})

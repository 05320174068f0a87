"""Meta's files: the inverse of how meta_kit shards them."""

import io
import shutil

import pytest
import torch
import transformers
from every import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_kit import (
    LLAMA3,
    PARAMS,
    PARAMS4,
    VERSIONS,
    VISION,
    D,
    H,
    V,
    change,
    edit,
    equal,
    files_of,
    llama,
    llama_shards,
    one_layer,
    randomise,
    same_logits,
    same_meaning,
    save,
    save_llama,
    shard,
)
from torch import Tensor

from vicugna import checkpoint
from vicugna.checkpoint.meta import params as meta_params

# Llama 1 to 3.3.

@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_llama(tmp_path, version, ranks):
    params, says = VERSIONS[version]
    theirs = llama(torch.bfloat16, **says)
    save_llama(tmp_path / "m", theirs, ranks, by_width=version[0] in "12c", **params)
    read = checkpoint.read(tmp_path / "m", None)
    equal(read, files_of(theirs, tmp_path / "hf"))
    same_meaning(read, theirs.config, tmp_path / "ours")
    same_logits(checkpoint.read(tmp_path / "m"), type(theirs).from_pretrained(
        tmp_path / "hf", dtype=torch.float32))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_number_of_ranks_and_heads(tmp_path_factory, data):
    ranks, K = data.draw(st.integers(1, 8)), 2 * data.draw(st.integers(1, 3))
    heads = ranks * data.draw(st.integers(1, 3))
    copied, by_width = data.draw(st.booleans()), data.draw(st.booleans())
    groups = data.draw(st.sampled_from([
        g for g in range(1, heads + 1) if heads % g == 0
        and (g % ranks == 0 or (ranks % g == 0 if copied else g * K % ranks == 0))]))
    params = {"dim": heads * K, "n_heads": heads, "n_kv_heads": groups, "n_layers": 1,
              "norm_eps": 1e-5, "multiple_of": ranks, "vocab_size": ranks * 3}
    state, folder = one_layer(params), tmp_path_factory.mktemp("m")
    save(folder, llama_shards(state, K, ranks, by_width, copied), params)
    equal(checkpoint.read(folder), state)
    shutil.rmtree(folder)


def test_a_head_equal_to_the_embeddings_is_tied_only_in_llama_3_2(tmp_path):
    theirs = llama(tie_word_embeddings=True)
    state = dict(theirs.state_dict())
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    shards = llama_shards(state, D // H, 2, False)
    third = {**PARAMS, "rope_theta": 500000.0}
    for scaled in (True, False):
        read = checkpoint.read(save(tmp_path / "m", shards, {**third, "use_scaled_rope": scaled}))
        assert read.network.config.tie_word_embeddings is scaled
        assert torch.equal(read.network.lm_head.weight, state["lm_head.weight"])
    shards[1]["output.weight"][-1, -1] += 1
    read = checkpoint.read(save(tmp_path / "m", shards, {**third, "use_scaled_rope": True}))
    assert read.origin.config["rope_scaling"]["factor"] == 8.0
    assert torch.equal(read.network.lm_head.weight[:V // 2], state["lm_head.weight"][:V // 2])
    assert not torch.equal(read.network.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize(("shape", "width"), [
    ({"dim": 4096, "n_heads": 32}, 11008), ({"dim": 5120, "n_heads": 40}, 13824),
    ({"dim": 6656, "n_heads": 52}, 17920), ({"dim": 8192, "n_heads": 64}, 22016),
    ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    ({"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    ({"dim": 16384, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
    ({"dim": 2048, "n_heads": 32, "ffn_dim_multiplier": 1.5}, 8192),
    ({"dim": 3072, "n_heads": 24, "ffn_dim_multiplier": 1.0}, 8192),
    ({"dim": 5120, "n_heads": 40, "multiple_of": 2048, "ffn_dim_multiplier": 1.2}, 16384)])
def test_feed_forward_of_published_models(shape, width):
    """Llama 1 and 2 7B, 13B, 30B, 65B; 2 70B; 3 8B, 405B; 3.2 1B, 3B; 4."""
    assert meta_params.Params(n_layers=1, norm_eps=1e-5, **shape).ffn_width() == width


def test_the_65b_of_llama_1_is_told_from_the_70b_of_llama_2():
    large = meta_params.Params(dim=8192, n_heads=64, n_layers=80, norm_eps=1e-5)
    assert meta_params.llama(large, 32000, False, False)[0]["max_position_embeddings"] == 2048
    large = meta_params.Params(dim=8192, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5)
    assert meta_params.llama(large, 32000, False, False)[0]["max_position_embeddings"] == 4096


def test_token_ids():
    third = meta_params.Params(**PARAMS, rope_theta=500000.0)
    _, generation = meta_params.llama(third, 128256, False, True)
    assert generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9,
                          "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    config, _ = meta_params.llama(third, 128256, False, False)
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, 128001)
    config, _ = meta_params.llama(meta_params.Params(**PARAMS), 32000, False, False)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    config, generation = meta_params.llama4(third, 202048, False, True)
    assert generation["eos_token_id"] == [200001, 200007, 200008]
    assert config["pad_token_id"] == 200018
    assert "bos_token_id" not in meta_params.llama(third, V, False, False)[0]


# Llama 4.

SCOUT = {"use_scaled_rope": True, "moe_args": {"num_experts": 16, "top_k": 1, "auto_scale_F": True,
                                               "capacity_factor": 1.0}}
MAVERICK = {"moe_args": {"num_experts": 4, "interleave_moe_layer_step": 2}}
FOURTH = {
    "scout": ({**SCOUT, "vision_args": VISION},
              {"num_local_experts": 16, "rope_parameters": {
                  **LLAMA3, "factor": 16.0, "high_freq_factor": 1.0}}),
    "maverick": ({**MAVERICK, "vision_args": VISION},
                 {"num_local_experts": 4, "interleave_moe_layer_step": 2}),
    "text": (MAVERICK, {"num_local_experts": 4, "interleave_moe_layer_step": 2}),
}


def llama4(dtype: torch.dtype, eyes: bool, **changes) -> torch.nn.Module:
    text = {"vocab_size": V, "hidden_size": D, "intermediate_size": 112,
            "intermediate_size_mlp": 208, "num_hidden_layers": 4, "num_attention_heads": H,
            "num_key_value_heads": 4, "head_dim": D // H, "attention_chunk_size": 8,
            "max_position_embeddings": 2**18, **changes}
    if not eyes:
        return randomise(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text)),
                         dtype)
    config = transformers.Llama4Config(text_config=text, vision_config={
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "vision_output_dim": 48,
        "projector_input_dim": 48, "projector_output_dim": 48})
    return randomise(transformers.Llama4ForConditionalGeneration(config), dtype)


def llama4_shards(state: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """What each rank saves."""
    text = {name.removeprefix("language_model."): tensor for name, tensor in state.items()}
    result = []
    for rank in range(ranks):
        saved = {"tok_embeddings.weight": shard(text["model.embed_tokens.weight"], 0, ranks, rank),
                 "norm.weight": text["model.norm.weight"].clone(),
                 "output.weight": shard(text["lm_head.weight"], 0, ranks, rank)}
        for n in range(4):
            saved |= llama4_layer({name.removeprefix(f"model.layers.{n}."): tensor
                                   for name, tensor in text.items()
                                   if name.startswith(f"model.layers.{n}.")},
                                  f"layers.{n}.", ranks, rank)
        for name, tensor in state.items():
            if name.startswith(("vision_model.", "multi_modal_projector.")):
                saved |= vision_part(name, tensor, ranks, rank)
        result.append(saved)
    return result


def llama4_layer(layer: dict[str, Tensor], start: str, ranks: int, rank: int) -> dict[str, Tensor]:
    """The part of one layer that a rank saves."""
    def part(name: str, dim: int = 0) -> Tensor:
        return shard(layer[f"{name}.weight"], dim, ranks, rank)

    saved = {"attention.wqkv.weight": torch.cat([part(f"self_attn.{x}_proj") for x in "qkv"]),
             "attention.wqkv.layer_norm_weight": layer["input_layernorm.weight"].clone(),
             "attention.wqkv._extra_state": io.BytesIO(b"of no use"),
             "attention.wo.weight": part("self_attn.o_proj", 1)}
    if "feed_forward.router.weight" in layer:
        fused = layer["feed_forward.experts.gate_up_proj"]
        gate, up = (shard(half, 2, ranks, rank).flatten(0, 1) for half in fused.chunk(2, 2))
        down = shard(layer["feed_forward.experts.down_proj"], 1, ranks, rank).flatten(0, 1)
        saved |= {
            "feed_forward.norm.weight": layer["post_attention_layernorm.weight"].clone(),
            "feed_forward.router_DE": layer["feed_forward.router.weight"].T.contiguous(),
            "feed_forward.experts.moe_w_in_eD_F": gate,
            "feed_forward.experts.moe_w_swiglu_eD_F": up,
            "feed_forward.experts.moe_w_out_eF_D": down,
            "feed_forward.w_in_shared_FD.weight": part("feed_forward.shared_expert.gate_proj"),
            "feed_forward.w_swiglu_FD.weight": part("feed_forward.shared_expert.up_proj"),
            "feed_forward.w_out_shared_DF.weight": part("feed_forward.shared_expert.down_proj", 1),
            "feed_forward.running_gate_stats_3E": torch.zeros(3, 4),
            "feed_forward.global_gate_stats_3E": torch.zeros(3, 4)}
    else:
        saved |= {
            "feed_forward.mlp.layer_norm_weight": layer["post_attention_layernorm.weight"].clone(),
            "feed_forward.mlp.fc1_weight": torch.cat([part("feed_forward.gate_proj"),
                                                      part("feed_forward.up_proj")]),
            "feed_forward.mlp.fc2_weight": part("feed_forward.down_proj", 1)}
    return {start + name: tensor for name, tensor in saved.items()}


def vision_part(name: str, tensor: Tensor, ranks: int, rank: int) -> dict[str, Tensor]:
    """The part that a rank saves of a tensor of the image encoder, under Meta's name."""
    dim = (None if "norm" in name or "embedding_vlm" in name or "class_embedding" in name
           or name.endswith(("o_proj.bias", "fc2.bias"))
           else 1 if name.endswith(("o_proj.weight", "fc2.weight")) else 0)
    for ours, theirs in (
            ("multi_modal_projector.linear_1", "vision_projection"),
            ("vision_model.vision_adapter.mlp.fc1", "vision_embeddings.vision_adapter.mlp.c_fc"),
            ("vision_model.vision_adapter.mlp.fc2", "vision_embeddings.vision_adapter.mlp.c_proj"),
            ("vision_model.model.layers.",
             "vision_embeddings.vision_encoder.transformer.resblocks."),
            ("vision_model.", "vision_embeddings.vision_encoder."),
            ("patch_embedding.linear", "conv1._linear"), ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"), ("layernorm_", "ln_"), ("self_attn.", "attn."),
            *((f"{x}_proj", f"w{x}") for x in "qkvo"), ("fc1", "c_fc"), ("fc2", "c_proj")):
        if not (theirs in ("c_fc", "c_proj") and theirs in name):
            name = name.replace(ours, theirs)
    return {name: tensor.clone() if dim is None else shard(tensor, dim, ranks, rank)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", FOURTH)
def test_every_llama_4(tmp_path, kind, ranks):
    params, says = FOURTH[kind]
    theirs = llama4(torch.bfloat16, "vision_args" in params, **says)
    due = files_of(theirs, tmp_path / "hf")
    save(tmp_path / "m", llama4_shards(due, ranks), {**PARAMS4, **params})
    read = checkpoint.read(tmp_path / "m", None)
    equal(read, due)
    same_meaning(read, theirs.config, tmp_path / "ours")
    same_logits(checkpoint.read(tmp_path / "m"), type(theirs).from_pretrained(
        tmp_path / "hf", dtype=torch.float32))


def test_context_of_llama_4():
    for name, experts, instruct, length in (
            ("base", 16, False, 262144), ("Scout", 16, True, 10485760),
            ("Maverick", 128, True, 1048576)):
        params = meta_params.Params(**PARAMS4, moe_args={"num_experts": experts})
        config, _ = meta_params.llama4(params, V, False, instruct)
        assert config["max_position_embeddings"] == length, name


def test_a_llama_4_without_experts_or_chunks():
    params = meta_params.Params(**{**PARAMS4, "attention_chunk_size": None,
                                   "nope_layer_interval": None})
    config, _ = meta_params.llama4(params, V, False, False)
    assert config["moe_layers"] == []
    assert config["no_rope_layers"] == [1, 1, 1, 1]
    assert config["layer_types"] == ["full_attention"] * 4


@pytest.mark.parametrize(("changes", "says"), [
    ({"moe_w_swiglu_eD_F": None}, "gate_up_proj is [4, 64, 112] instead of [4, 64, 224]"),
    ({"moe_w_swiglu_eD_F": torch.ones(4 * 32, 56)}, "into experts: its parts do not fit"),
    ({"moe_w_swiglu_eD_F": torch.ones(4 * 64, 56).half()}, "its parts do not fit"),
    ({"moe_w_in_eD_F": torch.ones(7, 56)}, "into experts"),
    ({"moe_w_out_eF_D": torch.ones(4 * 55, 64)}, "down_proj is [4, 110, 64] instead of"),
])
def test_experts_that_fit_no_llama_4(tmp_path, changes, says):
    state = llama4(torch.float32, False, **FOURTH["text"][1]).state_dict()
    folder = save(tmp_path / "m", llama4_shards(state, 2), {**PARAMS4, **MAVERICK})
    for rank in range(2):
        change(folder, rank, **{f"layers.1.feed_forward.experts.{name}": value
                                for name, value in changes.items()})
    fails(folder, says)
    edit(folder, moe_args=None)
    fails(folder, "params.json has no moe_args")



"""Meta's files: sharded here by hand, the inverse of what is tested, and closed to hostile ones."""

import io
import json
import os
import shutil
import zipfile
from base64 import b64encode
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import vicugna
from vicugna import checkpoint
from vicugna.checkpoint import meta_config
from vicugna.errors import VicugnaError
from vicugna.model import Model

D, H, V = 64, 8, 96
TOKENS = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(3))
PARAMS = {"dim": D, "n_layers": 2, "n_heads": H, "norm_eps": 1e-5, "multiple_of": 16,
          "vocab_size": -1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
THIRD = {"rope_theta": 500000.0, "vocab_size": V, "n_kv_heads": 4, "ffn_dim_multiplier": 1.3}
# For each version: what params.json has, and what config.json must say besides the shape.
VERSIONS = {
    "1": ({"norm_eps": 1e-6}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "2": ({}, {"max_position_embeddings": 4096}),
    "2 grouped": ({"n_kv_heads": 2, "ffn_dim_multiplier": 1.3},
                  {"max_position_embeddings": 4096, "num_key_value_heads": 2,
                   "intermediate_size": 224}),
    "code": ({"rope_theta": 1e6}, {"max_position_embeddings": 16384,
                                   "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "3": (THIRD, {"max_position_embeddings": 8192, "num_key_value_heads": 4,
                  "intermediate_size": 224,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "3.1": ({**THIRD, "use_scaled_rope": True},
            {"max_position_embeddings": 131072, "num_key_value_heads": 4,
             "intermediate_size": 224, "rope_parameters": LLAMA3}),
    "3.2": ({**THIRD, "use_scaled_rope": True},
            {"max_position_embeddings": 131072, "num_key_value_heads": 4, "intermediate_size": 224,
             "rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
}
NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
         "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}


def randomise(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and experts too
            parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A random model of transformers, of the shape of PARAMS."""
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": V, "hidden_size": D, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": H, "rms_norm_eps": 1e-5, **changes})), dtype)


def shard(tensor: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    return tensor.chunk(ranks, dim)[rank].clone()


def interleaved(weight: Tensor, K: int) -> Tensor:
    """Rows of each head from halves (i, i + K/2) to neighbours (2i, 2i + 1)."""
    return weight.view(-1, 2, K // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def llama_shards(state: dict[str, Tensor], K: int, ranks: int, by_width: bool,
                 copied: bool = True) -> list[dict[str, Tensor]]:
    """What each rank saves. Where there are fewer key heads than ranks, each has a whole one if
    they are `copied`, else a part of one."""
    result = []
    for rank in range(ranks):
        saved = {"tok_embeddings.weight": shard(state["model.embed_tokens.weight"],
                                                1 if by_width else 0, ranks, rank),
                 "norm.weight": state["model.norm.weight"].clone(),
                 "rope.freqs": torch.ones(K // 2, dtype=torch.complex64)}
        if "lm_head.weight" in state:
            saved["output.weight"] = shard(state["lm_head.weight"], 0, ranks, rank)
        layers = {name.split(".")[2] for name in state if ".layers." in name}
        for layer in layers:
            for theirs, ours in NAMES.items():
                weight = state[f"model.layers.{layer}.{ours}.weight"]
                if theirs in ("attention.wq", "attention.wk"):
                    weight = interleaved(weight, K)
                groups = len(weight) // K
                if weight.dim() == 1:
                    part = weight.clone()
                elif theirs in ("attention.wo", "feed_forward.w2"):
                    part = shard(weight, 1, ranks, rank)
                elif theirs in ("attention.wk", "attention.wv") and copied and groups < ranks:
                    part = shard(weight, 0, groups, rank * groups // ranks)
                else:
                    part = shard(weight, 0, ranks, rank)
                saved[f"layers.{layer}.{theirs}.weight"] = part
        result.append(saved)
    return result


def save(folder: Path, shards: list[dict[str, Tensor]], params: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, saved in enumerate(shards):
        torch.save(saved, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def save_llama(folder: Path, model: torch.nn.Module, ranks: int = 1, by_width: bool = True,
               **params) -> Path:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return save(folder, llama_shards(state, D // H, ranks, by_width), {**PARAMS, **params})


def files_of(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors as transformers writes them."""
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()}


def equal(read: checkpoint.Checkpoint, due: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and values are the same."""
    got = checkpoint.named_tensors(read.network)
    assert got.keys() == due.keys()
    for name, tensor in due.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def same_logits(read: checkpoint.Checkpoint, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert torch.allclose(Model(read.network).logits(TOKENS), want, atol=1e-5, rtol=0)


def same_meaning(read: checkpoint.Checkpoint, due: transformers.PretrainedConfig, folder: Path
                 ) -> None:
    """What we write of `read` is for transformers the config `due`."""
    checkpoint.write(folder, read.network, None, {})
    found = transformers.AutoConfig.from_pretrained(folder)
    assert type(found) is type(due)
    assert meaning(found.to_dict()) == meaning(due.to_dict())


def meaning(config: dict) -> dict:
    notes = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
             "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "use_cache"}
    return {key: meaning(value) if isinstance(value, dict) else value
            for key, value in config.items() if key not in notes}


def fails(folder: Path, says: str) -> None:
    """Loading refuses with one line that holds `says` and names the folder."""
    with pytest.raises(VicugnaError) as caught:
        checkpoint.read(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


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


def one_layer(params: dict) -> dict[str, Tensor]:
    """Random tensors of a model of one layer, by their names in Hugging Face's form."""
    p, generator = meta_config.Params(**params), torch.Generator().manual_seed(0)
    D, GK, F = p.dim, p.groups * p.head_width, p.inner()
    shapes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (GK, D), "self_attn.v_proj": (GK, D),
              "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
              "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()} | {
        "model.embed_tokens.weight": (p.vocab_size, D), "model.norm.weight": (D,),
        "lm_head.weight": (p.vocab_size, D)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


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
    assert read.config["rope_scaling"]["factor"] == 8.0
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
    assert meta_config.Params(n_layers=1, norm_eps=1e-5, **shape).inner() == width


def test_the_65b_of_llama_1_is_told_from_the_70b_of_llama_2():
    large = meta_config.Params(dim=8192, n_heads=64, n_layers=80, norm_eps=1e-5)
    assert meta_config.llama(large, 32000, False, False)[0]["max_position_embeddings"] == 2048
    large = meta_config.Params(dim=8192, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5)
    assert meta_config.llama(large, 32000, False, False)[0]["max_position_embeddings"] == 4096


def test_token_ids():
    third = meta_config.Params(**PARAMS, rope_theta=500000.0)
    _, generation = meta_config.llama(third, 128256, False, True)
    assert generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9,
                          "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    config, _ = meta_config.llama(third, 128256, False, False)
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, 128001)
    config, _ = meta_config.llama(meta_config.Params(**PARAMS), 32000, False, False)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    config, generation = meta_config.llama4(third, 202048, False, True)
    assert generation["eos_token_id"] == [200001, 200007, 200008]
    assert config["pad_token_id"] == 200018
    assert "bos_token_id" not in meta_config.llama(third, V, False, False)[0]


# Llama 4.

VISION = {"image_size": {"height": 16, "width": 16}, "patch_size": {"height": 4, "width": 4},
          "dim": 32, "n_layers": 2, "n_heads": 4, "mlp_ratio": 4.0, "output_dim": 48,
          "pixel_shuffle_ratio": 0.5}
PARAMS4 = {**PARAMS, "vocab_size": 7, "n_kv_heads": 4, "n_layers": 4, "ffn_exp": 4,
           "ffn_dim_multiplier": 1.2, "rope_theta": 500000.0, "attention_chunk_size": 8,
           "nope_layer_interval": 4, "use_qk_norm": True, "use_scaled_rope": False}
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
        params = meta_config.Params(**PARAMS4, moe_args={"num_experts": experts})
        config, _ = meta_config.llama4(params, V, False, instruct)
        assert config["max_position_embeddings"] == length, name


def test_a_llama_4_without_experts_or_chunks():
    params = meta_config.Params(**{**PARAMS4, "attention_chunk_size": None,
                                   "nope_layer_interval": None})
    config, _ = meta_config.llama4(params, V, False, False)
    assert config["moe_layers"] == []
    assert config["no_rope_layers"] == [1, 1, 1, 1]
    assert config["layer_types"] == ["full_attention"] * 4


@pytest.mark.parametrize(("changes", "says"), [
    ({"moe_w_swiglu_eD_F": None}, "gate_up_proj is [4, 64, 112] instead of [4, 64, 224]"),
    ({"moe_w_swiglu_eD_F": torch.ones(4 * 32, 56)}, "makes no experts: its parts do not fit"),
    ({"moe_w_swiglu_eD_F": torch.ones(4 * 64, 56).half()}, "its parts do not fit"),
    ({"moe_w_in_eD_F": torch.ones(7, 56)}, "makes no experts"),
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


# Where the files lie.

@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "m", llama(), 2)


def edit(folder: Path, **changes) -> None:
    """Change keys of params.json; None removes one."""
    content = {**json.loads((folder / "params.json").read_text()), **changes}
    (folder / "params.json").write_text(json.dumps(
        {key: value for key, value in content.items() if value is not None}))


def change(folder: Path, rank: int, **changes) -> None:
    """Change tensors of one rank; None removes one."""
    path = folder / f"consolidated.{rank:02}.pth"
    with torch.serialization.safe_globals([io.BytesIO]):
        content = {**torch.load(path), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def test_layouts(folder, tmp_path):
    digest = checkpoint.read(folder).digest
    shutil.copytree(folder, tmp_path / "hf" / "original")
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert checkpoint.read(tmp_path / "hf").digest == digest
    assert checkpoint.read(tmp_path / "hf" / "original").digest == digest
    for rank in range(2):  # as Llama 3.1 405B
        content = torch.load(folder / f"consolidated.{rank:02}.pth")
        (folder / f"consolidated.{rank:02}.pth").unlink()
        (folder / f"consolidated.{rank:02}").mkdir()
        for part in range(2):
            torch.save(dict(list(content.items())[part::2]),
                       folder / f"consolidated.{rank:02}" / f"consolidated-0000{part}-of-2.pth")
    assert checkpoint.read(folder).digest == digest
    single = save_llama(tmp_path / "single", llama())
    os.rename(single / "consolidated.00.pth", single / "consolidated.pth")
    assert checkpoint.read(single).digest == digest
    nested = {"model": json.loads((single / "params.json").read_text())}
    (single / "params.json").write_text(json.dumps(nested))
    assert checkpoint.read(single).digest == digest


def test_the_hugging_face_form_comes_first(folder, tmp_path):
    other = llama(num_hidden_layers=1)
    other.save_pretrained(folder)
    assert checkpoint.read(folder).network.config.num_hidden_layers == 1


def test_the_name_tells_an_instruct_model(tmp_path):
    params = {"dim": 4, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-5, "multiple_of": 2,
              "rope_theta": 500000.0, "vocab_size": 128256}
    shards = llama_shards(one_layer(params), 2, 1, False)
    for name, ends in (("Llama3.1-8B", 128001), ("Llama3.1-8B-Instruct/original", [128001, 128008,
                                                                                   128009])):
        found = checkpoint.survey(save(tmp_path / name, shards, params))
        assert found.generation_config["eos_token_id"] == ends


def ranks_file(path: Path) -> None:
    """A tokenizer.model in tiktoken's form, whose tokens are the 256 bytes."""
    path.write_text("".join(f"{b64encode(bytes([n])).decode()} {n}\n" for n in range(256)))


def test_the_tokenizer(tmp_path):
    model = llama(num_key_value_heads=4, intermediate_size=224, vocab_size=512)
    folder = save_llama(tmp_path / "llama" / "8B", model, **THIRD | {"vocab_size": 512})
    assert checkpoint.read(folder).tokenizer is None
    ranks_file(tmp_path / "llama" / "tokenizer.model")  # where Llama 1 and 2 have it
    third = checkpoint.read(folder).tokenizer
    assert third.encode("ab") == [97, 98]
    assert (third.id_of("<|eot_id|>"), third.id_of("<|eom_id|>")) == (265, None)
    shutil.move(tmp_path / "llama" / "tokenizer.model", folder / "tokenizer.model")
    assert checkpoint.read(folder).tokenizer.digest == third.digest
    edit(folder, use_scaled_rope=True)  # Llama 3.1 names its control tokens otherwise
    loaded = vicugna.load(folder)
    assert loaded.tokenizer.id_of("<|eom_id|>") == 264
    said = loaded.generate("ab", max_new_tokens=3)
    loaded.save(tmp_path / "hf")
    again = vicugna.load(tmp_path / "hf")
    assert again.digest == loaded.digest
    assert again.generate("ab", max_new_tokens=3) == said
    save_llama(folder, llama(num_key_value_heads=4, intermediate_size=224), **THIRD)
    fails(folder, "512 tokens, but 96 embeddings")
    (folder / "tokenizer.model").write_text("x")
    fails(folder, "not a tokenizer")


def test_saved_as_a_hugging_face_folder(folder, tmp_path):
    read = checkpoint.read(folder)
    checkpoint.write(tmp_path / "hf", read.network, read.tokenizer, read.generation_config)
    assert checkpoint.read(tmp_path / "hf").digest == read.digest
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    same_logits(read, theirs)


# Hostile and broken folders.

class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(folder, tmp_path, zipped):
    path = folder / "consolidated.01.pth"
    torch.save({**torch.load(path), "norm.weight": Evil(tmp_path / "ran")}, path,
               _use_new_zipfile_serialization=zipped)
    fails(folder, "refused: its pickle calls posix.mkdir" if zipped else "truncated, or not a file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.Size([2]), torch.device("cpu"), bytearray(8), {1, 2},
                                   torch.zeros(2, 2).to_sparse()], ids=lambda v: type(v).__name__)
def test_what_no_checkpoint_needs_is_not_unpickled(folder, value):
    change(folder, 0, more=value)
    fails(folder, "refused: its pickle calls")


@pytest.mark.parametrize("share", [0, 0.00001, 0.5, 0.99])
def test_truncated(folder, share):
    path = folder / "consolidated.01.pth"
    os.truncate(path, int(path.stat().st_size * share))
    fails(folder, "consolidated.01.pth: truncated")


def test_bytes_missing_within(folder):
    path = folder / "consolidated.01.pth"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + content[5100:])
    fails(folder, "consolidated.01.pth: truncated")


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    """Write PyTorch's archive again, with another content of some records, as other tools and
    older releases lay it out."""
    with zipfile.ZipFile(path) as archive:  # without the notes of newer releases of PyTorch
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()
                   if "/." not in entry.filename}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, records.get(name.split("/")[-1], data))


def test_archives(folder):
    path = folder / "consolidated.00.pth"
    digest = checkpoint.read(folder).digest
    rezip(path)
    assert checkpoint.read(folder).digest == digest
    rezip(path, **{"0": b"short"})
    fails(folder, "its bytes are not in the file")
    rezip(path, **{"data.pkl": b"\x80\x02" + b"N0" * 2 * 10**6 + b"."})
    fails(folder, "not an archive as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02]."})
    fails(folder, "not a file of tensors")
    rezip(path, **{"data.pkl": b"\x80\x04}."})
    fails(folder, "not a pickle as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02" + b"N0" * 200_000 + b"."})
    fails(folder, "not a pickle as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02K\x01K\x02\x85R."})
    fails(folder, "PyTorch does not unpickle it")


def test_a_compressed_archive(folder):
    rezip(folder / "consolidated.00.pth", zipfile.ZIP_DEFLATED)
    fails(folder, "not an archive as PyTorch writes them")


def test_tensors_larger_than_the_file(folder):
    change(folder, 0, **{"norm.weight": torch.zeros(1).expand(10**12)})
    fails(folder, "its bytes are not in the file")
    big = torch.zeros(10**5)
    change(folder, 0, **{"norm.weight": None, **{f"layers.{n}.x": big for n in range(1000)}})
    fails(folder, "claim more bytes than it has")


def test_nan(folder):
    weight = torch.load(folder / "consolidated.01.pth")["layers.1.feed_forward.w2.weight"]
    weight[3, 3] = float("nan")
    change(folder, 1, **{"layers.1.feed_forward.w2.weight": weight})
    checkpoint.survey(folder)  # which reads no values
    fails(folder, "1 of 11,264 values are NaN or infinite")


@pytest.mark.parametrize(("rank", "changes", "says"), [
    (1, {"norm.weight": None}, "norm.weight: not every shard has it"),
    (1, {"layers.7.ffn_norm.weight": torch.ones(D)}, "not every shard has it"),
    (1, {"layers.0.feed_forward.w1.weight": torch.ones(87, D)},
     "[87, 64] of torch.float32, but [88, 64] of torch.float32 in consolidated.00.pth"),
    (1, {"norm.weight": torch.ones(D).bfloat16()}, "[64] of torch.bfloat16, but"),
    (1, {"norm.weight": torch.ones(D).int()}, "stored as torch.int32, which is not read"),
])
def test_shards_that_differ(folder, rank, changes, says):
    change(folder, rank, **changes)
    fails(folder, says)


@pytest.mark.parametrize(("changes", "says"), [
    ({"bias": torch.ones(D)}, "unexpected: no Llama of Meta has it"),
    ({"layers.0.attention.wo.weight": torch.ones(D)}, "one that is not a matrix"),
    ({"layers.0.attention.wq.weight": torch.ones(31, D)}, "makes no q_proj"),
    ({"layers.0.attention.wv.weight": torch.ones(D)}, "v_proj.weight is [64] instead of [64, 64]"),
    ({"layers.0.attention.wv.weight": None}, "missing model.layers.0.self_attn.v_proj.weight"),
    ({"layers.0.attention.wv.weight": torch.ones(8, D)}, "v_proj.weight is [16, 64] instead"),
    ({"layers.0.feed_forward.w2.weight": torch.tensor(1.0)}, "makes no down_proj"),
    ({"layers.0.attention.wk.weight": torch.tensor(1.0)}, "makes no k_proj"),
    ({"tok_embeddings.weight": torch.ones(V, D)}, "wrong shape"),
    ({7: torch.ones(2)}, "not a file of tensors"),
])
def test_tensors_that_fit_no_llama(folder, changes, says):
    for rank in range(2):
        content = {**torch.load(folder / f"consolidated.{rank:02}.pth"), **changes}
        torch.save({key: value for key, value in content.items() if value is not None},
                   folder / f"consolidated.{rank:02}.pth")
    fails(folder, says)


def test_missing_shards(tmp_path):
    folder = save_llama(tmp_path / "m", llama(), 4)
    (folder / "consolidated.03.pth").rename(tmp_path / "last")
    fails(folder, "3 shards are there, but 4 make a model of width 64")
    (tmp_path / "last").rename(folder / "consolidated.03.pth")
    (folder / "consolidated.01.pth").unlink()
    fails(folder, "consolidated.01.pth is missing")
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.0.pth")
    fails(folder, "is a second shard 0")


def test_links_out_of_the_folder(folder, tmp_path):
    for name in ("consolidated.01.pth", "params.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        fails(folder, f"'{name}' leads out of the folder")


@pytest.mark.parametrize(("changes", "says"), [
    *(({key: None}, f"missing {key}") for key in ("dim", "n_layers", "n_heads", "norm_eps")),
    ({"dim": "64"}, "dim: Input should be a valid integer"),
    ({"dim": True}, "dim: Input should be a valid integer"),
    ({"dim": 2**70}, "dim: Input should be less than"),
    ({"n_layers": 0}, "n_layers: Input should be greater than 0"),
    ({"n_layers": 10**9}, "n_layers is 1,000,000,000, but there are only"),
    ({"n_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
    ({"n_heads": 7}, "dim 64 is not n_heads 7"),
    ({"n_heads": 64}, "a head's width, 1, is odd"),
    ({"n_kv_heads": 3}, "params.json: num_attention_heads 8 is not a multiple of num_key_value"),
    ({"head_dim": 16}, "dim 64 is not n_heads 8"),
    ({"dim": 128}, "2 shards are there, but 4 make a model of width 128"),
    ({"multiple_of": 256}, "is [176, 64] instead of [256, 64]"),
    ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier: Input should be less than"),
    ({"norm_eps": float("nan")}, "outside JSON"),
    ({"vocab_size": 95}, "vocab_size is 95, but there are 96 embeddings"),
    ({"moe_args": {"top_k": 1}}, "missing moe_args.num_experts"),
    ({"quantization_args": {"scheme": "int4"}}, "it is quantised"),
    ({"lora_args": {"rank": 16}}, "it has LoRA adapters"),
    ({"vision_chunk_size": 448}, "Llama 3.2 with images"),
    ({"sliding_window": 4096}, "it is not a Llama"),
])
def test_impossible_params(folder, changes, says):
    edit(folder, **changes)
    fails(folder, says)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, "1" * 5000])
def test_malformed_params(folder, content):
    (folder / "params.json").write_text(content)
    fails(folder, "params.json")


def test_images_that_are_not_square(tmp_path):
    with pytest.raises(VicugnaError, match="not square"):
        meta_config.parse({**PARAMS4, "vision_args": {
            **VISION, "patch_size": {"height": 4, "width": 2}}}, tmp_path)

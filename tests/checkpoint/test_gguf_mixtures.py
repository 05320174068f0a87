"""Llama 4 and DeepSeek V3 in GGUF: tensors that lie otherwise there, keys of their own, and what
llama.cpp's code has fixed."""

import json

import every
import gguf
import pytest
import torch
from gguf_kit import DEEPSEEK, LLAMA3, LLAMA4, MODELS, fails, folder_of, network_of, rewritten, same

from vicugna import checkpoint
from vicugna.checkpoint.convert import convert
from vicugna.errors import Refused, VicugnaError
from vicugna.model import Model

YARN = MODELS["deepseek yarn"]["rope_scaling"]


def tensors_of(path) -> dict[str, torch.Tensor]:
    """What gguf's own reader finds in a file of float32."""
    return {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path, architecture: str) -> dict:
    return {name.removeprefix(f"{architecture}."): field.contents()
            for name, field in gguf.GGUFReader(path).fields.items()
            if name.startswith(f"{architecture}.")}


# What lies where.

def test_llama4(tmp_path):
    """Experts are turned, and gates are apart from ups; RoPE's rows stay where they are."""
    folder_of(tmp_path / "a", LLAMA4, None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    ours, theirs = (checkpoint.named_tensors(network_of(LLAMA4)), tensors_of(tmp_path / "m.gguf"))
    experts = ours["model.layers.1.feed_forward.experts.gate_up_proj"]  # [E, D, 2F]
    down = ours["model.layers.1.feed_forward.experts.down_proj"]  # [E, F, D]
    for n in range(6):
        assert torch.equal(theirs["blk.1.ffn_gate_exps.weight"][n], experts[n, :, :64].T)
        assert torch.equal(theirs["blk.1.ffn_up_exps.weight"][n], experts[n, :, 64:].T)
        assert torch.equal(theirs["blk.1.ffn_down_exps.weight"][n], down[n].T)
    for name, other in (("attn_q", "self_attn.q_proj"), ("ffn_gate_inp", "feed_forward.router"),
                        ("ffn_up_shexp", "feed_forward.shared_expert.up_proj")):
        assert torch.equal(theirs[f"blk.1.{name}.weight"], ours[f"model.layers.1.{other}.weight"])
    assert torch.equal(theirs["blk.2.ffn_down.weight"],
                       ours["model.layers.2.feed_forward.down_proj.weight"])
    common = {"attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output"}
    mixed = {"ffn_gate_inp", *(f"ffn_{part}_{kind}" for part in ("gate", "up", "down")
                               for kind in ("exps", "shexp"))}
    assert theirs.keys() == {"token_embd.weight", "output_norm.weight", "output.weight"} | {
        f"blk.{n}.{name}.weight" for n in range(4)
        for name in common | (mixed if n % 2 else {"ffn_gate", "ffn_up", "ffn_down"})}
    assert keys_of(tmp_path / "m.gguf", "llama4") == pytest.approx({
        "vocab_size": 610, "context_length": 256, "embedding_length": 64, "block_count": 4,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "rope.dimension_count": 16, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "feed_forward_length": 96, "expert_count": 6,
        "expert_feed_forward_length": 64, "expert_used_count": 1, "interleave_moe_layer_step": 2})


def test_deepseek(tmp_path):
    """Of a head what makes keys of the latent lies turned and apart from what makes values."""
    folder_of(tmp_path / "a", DEEPSEEK, None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    ours, theirs = (checkpoint.named_tensors(network_of(DEEPSEEK)), tensors_of(tmp_path / "m.gguf"))
    made = ours["model.layers.1.self_attn.kv_b_proj.weight"].view(4, 32 + 24, 64)
    for head in range(4):
        assert torch.equal(theirs["blk.1.attn_k_b.weight"][head], made[head, :32].T)
        assert torch.equal(theirs["blk.1.attn_v_b.weight"][head], made[head, 32:])
    assert torch.equal(theirs["blk.1.exp_probs_b.bias"],
                       ours["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert torch.equal(theirs["blk.1.ffn_up_exps.weight"][5],
                       ours["model.layers.1.mlp.experts.5.up_proj.weight"])
    common = {"attn_norm", "ffn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa",
              "attn_kv_a_norm", "attn_k_b", "attn_v_b", "attn_output"}
    dense = {"ffn_gate", "ffn_up", "ffn_down"}
    mixed = {"ffn_gate_inp", *(f"{name}_{kind}" for name in dense for kind in ("exps", "shexp"))}
    assert theirs.keys() == {"token_embd.weight", "output_norm.weight", "output.weight",
                             "blk.1.exp_probs_b.bias"} | {
        f"blk.{n}.{name}.weight" for n in range(2) for name in common | (mixed if n else dense)}
    assert keys_of(tmp_path / "m.gguf", "deepseek2") == pytest.approx({
        "vocab_size": 610, "context_length": 256, "embedding_length": 64, "block_count": 2,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 64 + 8,
        "attention.value_length": 64, "attention.key_length_mla": 32 + 8,
        "attention.value_length_mla": 24, "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 64, "rope.dimension_count": 8, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-6, "feed_forward_length": 96, "expert_count": 8,
        "expert_feed_forward_length": 32, "expert_used_count": 3, "expert_shared_count": 1,
        "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_norm": True,
        "expert_weights_scale": 2.5, "expert_gating_func": 2, "leading_dense_block_count": 1})


def test_yarn_of_deepseek(tmp_path):
    """As llama.cpp's converter has it: a tenth of mscale_all_dim."""
    folder_of(tmp_path / "a", MODELS["deepseek yarn"], None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    keys = keys_of(tmp_path / "m.gguf", "deepseek2")
    assert keys["rope.scaling.type"] == "yarn" and keys["rope.scaling.factor"] == 4
    assert keys["rope.scaling.original_context_length"] == 64
    assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    assert checkpoint.read(tmp_path / "f.gguf").network.config.rope_scaling == YARN
    fast, slow = (f"deepseek2.rope.scaling.yarn_beta_{name}" for name in ("fast", "slow"))
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", **{fast: 32.0, slow: 1.0})
    assert checkpoint.read(tmp_path / "f.gguf").network.config.rope_scaling == YARN | {
        "beta_fast": 32.0, "beta_slow": 1.0}
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", **{slow: 4.0})
    fails(tmp_path / "f.gguf", "yarn of unusual settings")  # which llama.cpp does not see


def test_rows_of_a_stack_that_fill_no_blocks_stay_f16(tmp_path):
    folder_of(tmp_path / "a", DEEPSEEK | {"qk_nope_head_dim": 20}, None)
    convert(tmp_path / "a", tmp_path / "m.gguf", dtype="q8_0", lossy=True)
    kinds = {tensor.name: tensor.tensor_type.name
             for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_k_b.weight"] == "F16" and kinds["blk.0.attn_v_b.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    whole = checkpoint.named_tensors(checkpoint.read(tmp_path / "m.gguf").network)
    before = checkpoint.named_tensors(checkpoint.read(tmp_path / "a").network)
    for name, tensor in before.items():
        assert (whole[name] - tensor).norm() <= 0.01 * tensor.norm(), name


def test_a_part_of_another_type_keeps_its_precision(tmp_path):
    checkpoint.Checkpoint(network_of(DEEPSEEK, torch.bfloat16)).save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "m.gguf")
    values = torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(0))
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", tensors={
        "blk.0.attn_v_b.weight": values.numpy()})
    read = checkpoint.named_tensors(checkpoint.read(tmp_path / "f.gguf").network)
    made = read["model.layers.0.self_attn.kv_b_proj.weight"].view(4, 32 + 24, 64)
    assert torch.equal(made[:, 32:], values)


def test_all_groups_are_one(tmp_path):
    """llama.cpp takes no file in which every group may be chosen."""
    folder_of(tmp_path / "a", DEEPSEEK | {"topk_group": 4}, None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    keys = keys_of(tmp_path / "m.gguf", "deepseek2")
    assert (keys["expert_group_count"], keys["expert_group_used_count"]) == (1, 1)


def test_biases_that_choose_experts_stay_float32(tmp_path):
    """Also where bfloat16 would do."""
    network = network_of(DEEPSEEK, torch.bfloat16)
    for buffer in network.buffers():
        buffer.zero_()
    checkpoint.Checkpoint(network).save(tmp_path / "a")
    for source, target in (("a", "m.gguf"), ("m.gguf", "b")):
        convert(tmp_path / source, tmp_path / target)
    before, after = (checkpoint.survey(tmp_path / name).stored for name in "ab")
    assert {name: x.dtype for name, x in after.items()} == {
        name: x.dtype for name, x in before.items()}
    assert after["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


# What transformers writes, and what cannot be kept.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v3"])
def test_from_transformers_and_back(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setitem(every.LLAMA4, "attention_chunk_size", 8192)
    every.save(kind, tmp_path / "a", dtype)
    for source, target in (("a", "m.gguf"), ("m.gguf", "b")):
        assert convert(tmp_path / source, tmp_path / target)["lost"] == []
    same(checkpoint.read(tmp_path / "a", None), checkpoint.read(tmp_path / "b", None))
    names = ("config.json", "model.safetensors")
    config, weights = ([(tmp_path / x / name).read_bytes() for x in "ab"] for name in names)
    assert checkpoint.survey(tmp_path / "a").stored.keys() == checkpoint.survey(
        tmp_path / "b").stored.keys()
    before, after = map(json.loads, config)
    assert before.items() <= after.items()
    assert len(weights[0]) - 64 <= len(weights[1]) <= len(weights[0]) + 64  # same dtypes
    loaded = every.auto(kind).from_pretrained(tmp_path / "b", dtype=dtype).state_dict()
    for name, tensor in every.auto(kind).from_pretrained(tmp_path / "a", dtype=dtype
                                                         ).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_the_vision_encoder_is_left_out_with_lossy_only(tmp_path, monkeypatch):
    monkeypatch.setitem(every.LLAMA4, "attention_chunk_size", None)
    every.save("llama4", tmp_path / "a")
    with pytest.raises(Refused, match="would lose the vision encoder: images are left out"):
        convert(tmp_path / "a", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    done = convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)
    assert done["lost"] == ["the vision encoder: images are left out"]
    whole, text = checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "m.gguf")
    assert text.origin.config["model_type"] == "llama4_text" and text.config.vision_config is None
    tokens = torch.randint(3, 80, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Model(text.network).logits(tokens), Model(whole.network).logits(tokens))
    assert done["tensors"] == len(checkpoint.named_tensors(text.network))
    assert [text.origin.config[f"{key}_token_id"] for key in ("eos", "bos")] == [2, 1]


def test_layers_that_predict_further_tokens_are_a_loss(tmp_path):
    network = network_of(DEEPSEEK | {"num_nextn_predict_layers": 1})
    checkpoint.Checkpoint(network, None, {}, checkpoint.Origin(
        network.config.to_dict(), None, {}, {"model.layers.2.eh_proj.weight": torch.ones(3, 2)}
    )).save(tmp_path / "a")
    with pytest.raises(Refused, match="1 tensors that the model does not compute with"):
        convert(tmp_path / "a", tmp_path / "m.gguf")
    convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)
    assert checkpoint.read(tmp_path / "m.gguf").network.config == network.config


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("changes", "says"), [
    (LLAMA4 | {"attention_bias": True}, "attention_bias"),
    (LLAMA4 | {"no_rope_layer_interval": 3}, "RoPE in other layers than all but every 4th"),
    (LLAMA4 | {"no_rope_layers": [1, 1, 1, 1]}, "RoPE in other layers"),
    (LLAMA4 | {"use_qk_norm": False}, "use_qk_norm False with 6 experts"),
    (LLAMA4 | {"num_local_experts": 128}, "use_qk_norm True with 128 experts"),
    (LLAMA4 | {"moe_layers": [0, 1, 3]}, "experts in other layers than every nth"),
    (DEEPSEEK | {"attention_bias": True}, "attention_bias"),
    (DEEPSEEK | {"n_shared_experts": 0}, "n_shared_experts or routed_scaling_factor of 0"),
    (DEEPSEEK | {"routed_scaling_factor": 0.0}, "n_shared_experts or routed_scaling_factor of 0"),
    (DEEPSEEK | {"num_hidden_layers": 27}, "q_lora_rank in 27 layers"),
    (DEEPSEEK | {"rope_scaling": LLAMA3}, "rope_scaling llama3"),
    (DEEPSEEK | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling linear"),
    (DEEPSEEK | {"rope_scaling": YARN | {"mscale_all_dim": 0}}, "yarn without mscale_all_dim"),
    (DEEPSEEK | {"rope_scaling": YARN | {"factor": 0.5}}, "of a factor below 1"),
    (DEEPSEEK | {"rope_scaling": YARN | {"mscale": 1.0}}, "yarn of unusual settings"),
    (DEEPSEEK | {"rope_scaling": YARN | {"beta_slow": 4}}, "yarn of unusual settings"),
])
def test_models_that_llama_cpp_has_not(tmp_path, changes, says):
    folder_of(tmp_path / "a", changes, None)
    with pytest.raises(VicugnaError, match=f"{says}.*cannot be represented in GGUF"):
        convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)


@pytest.mark.parametrize(("changes", "says"), [
    (LLAMA4 | {"attention_chunk_size": 128}, "which tokens a layer sees"),
    (LLAMA4 | {"layer_types": ["full_attention"] * 4, "max_position_embeddings": 9000},
     "which tokens a layer sees"),
    (LLAMA4 | {"layer_types": ["chunked_attention"] * 4, "max_position_embeddings": 9000},
     "which tokens a layer sees"),
    (LLAMA4 | {"floor_scale": 64}, "the query temperature scale"),
    (LLAMA4 | {"attn_scale": 0.2, "max_position_embeddings": 9000}, "the query temperature scale"),
    (LLAMA4 | {"attn_temperature_tuning": False, "max_position_embeddings": 9000},
     "the query temperature scale"),
    (DEEPSEEK | {"rms_norm_eps": 1e-5}, "the epsilon 1e-06 of norms of latents"),
])
def test_what_llama_cpp_computes_otherwise_is_a_loss(tmp_path, changes, says):
    folder_of(tmp_path / "a", changes, None)
    with pytest.raises(Refused, match=f"would lose {says}"):
        convert(tmp_path / "a", tmp_path / "m.gguf")
    assert len(convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)["lost"]) == 1
    same(checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "m.gguf"))


@pytest.mark.parametrize("changes", [
    LLAMA4 | {"attention_chunk_size": 256, "floor_scale": 257},  # no text is so long
    LLAMA4 | {"max_position_embeddings": 10**6},
    LLAMA4 | {"attn_temperature_tuning": False, "num_hidden_layers": 3,  # all have RoPE
              "max_position_embeddings": 9000},
    LLAMA4 | {"moe_layers": []}, LLAMA4 | {"moe_layers": [1, 3], "interleave_moe_layer_step": 1},
    LLAMA4 | {"num_local_experts": 128, "use_qk_norm": False, "intermediate_size": 32},
    DEEPSEEK | {"num_hidden_layers": 27, "q_lora_rank": None, "first_k_dense_replace": 27},
    DEEPSEEK | {"rope_scaling": YARN | {"attention_factor": 1.0, "mscale": None}}])
def test_other_spellings_of_what_llama_cpp_has(tmp_path, changes):
    """Nothing is lost, and the model is the same by GGUF's own keys too."""
    folder_of(tmp_path / "a", changes, None)
    assert convert(tmp_path / "a", tmp_path / "m.gguf")["lost"] == []
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    tokens = torch.randint(0, 600, (1, 20), generator=torch.Generator().manual_seed(0))
    before, after = (Model(checkpoint.read(tmp_path / name).network).logits(tokens)
                     for name in ("a", "f.gguf"))
    assert torch.equal(before, after)


# Files of other writers.

@pytest.mark.parametrize(("name", "changes", "says"), [
    ("llama4", {"llama4.attention.sliding_window": 0}, "sliding_window is not known"),
    ("llama4", {"llama4.expert_count": None}, "key llama4.expert_count is missing"),
    ("llama4", {"llama4.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
    ("llama4", {"llama4.interleave_moe_layer_step": 1}, "missing model.layers.0.feed_forward.exp"),
    ("llama4", {"llama4.rope.dimension_count": 8}, "rope.dimension_count is 8, not 16"),
    ("llama4", {"llama4.expert_count": 128}, "is [6, 64, 64] instead of [128, 64, 64]"),
    ("deepseek", {"deepseek2.nextn_predict_layers": 1}, "nextn_predict_layers is not known"),
    ("deepseek", {"deepseek2.expert_gating_func": 1}, "expert_gating_func is 1, not 2"),
    ("deepseek", {"deepseek2.attention.key_length_mla": None}, "qk_nope_head_dim is -8"),
    ("deepseek", {"deepseek2.attention.key_length": 70}, "key_length is 70, not 72"),
    ("deepseek", {"deepseek2.attention.head_count_kv": 4}, "head_count_kv is 4, not 1"),
    ("deepseek", {"deepseek2.expert_count": 2**30}, "n_routed_experts is 1,073,741,824"),
    ("deepseek", {"deepseek2.expert_group_count": 3}, "n_group is 3"),
    ("deepseek", {"deepseek2.leading_dense_block_count": 2}, "unexpected model.layers.1.mlp"),
    ("deepseek", {"deepseek2.attention.kv_lora_rank": "much"}, "kv_lora_rank is 'much'"),
    ("deepseek yarn", {"deepseek2.rope.scaling.yarn_log_multiplier": None},
     "yarn without mscale_all_dim"),
    ("deepseek yarn", {"deepseek2.rope.scaling.type": None}, "rope_scaling linear"),
    ("deepseek", {"vicugna.config": " " * 10**6 + "1"},
     "over 1,000,000 characters"),
    ("deepseek", {"vicugna.config": '{"model_type": "llama4"}'}, ""),
])
def test_keys_that_are_refused(tmp_path, name, changes, says):
    folder_of(tmp_path / "a", MODELS[name], None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", **changes)
    if says:
        fails(tmp_path / "f.gguf", says)
    else:  # it is not believed
        assert checkpoint.read(tmp_path / "f.gguf").network.config.q_lora_rank == 32

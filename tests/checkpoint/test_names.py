"""Names of parameters in the files of each form, against those that others use."""

import gguf
import pytest
from every import CONFIGS

from vicugna import checkpoint, models
from vicugna.checkpoint import names
from vicugna.checkpoint.gguf.keys import ARCHITECTURES
from vicugna.checkpoint.gguf.tensors import hf_name


def test_files_hold_one_tensor_for_each_projection_of_an_expert() -> None:
    of_experts = names.of("deepseek_v3").of_experts
    found = of_experts("model.layers.2.mlp.experts.gate_up_proj", 16) or []
    assert len(found) == 32 and found[:3] == [
        "model.layers.2.mlp.experts.0.gate_proj.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight",
        "model.layers.2.mlp.experts.1.gate_proj.weight"]
    assert (of_experts("model.layers.2.mlp.experts.down_proj", 16) or [])[15] == (
        "model.layers.2.mlp.experts.15.down_proj.weight")
    assert of_experts("model.layers.0.mlp.down_proj.weight", 16) is None
    assert of_experts("model.layers.1.mlp.shared_experts.down_proj.weight", 16) is None


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind in ARCHITECTURES])
def test_every_parameter_has_a_name_in_gguf_that_llama_cpp_knows(kind: str) -> None:
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[
        ARCHITECTURES[kind]]
    known = {gguf.TENSOR_NAMES[one].format(bid=0, xid=0)
             for one in gguf.MODEL_TENSORS[architecture]}
    network = models.build({"model_type": kind, **CONFIGS[kind]})
    general = {one.name for one in names.of(kind).parameters}
    for name in checkpoint.named_tensors(network):
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = "#"
        if "experts" in parts and parts[-2] != "experts":
            parts[parts.index("experts") + 1] = "*"
        assert ".".join(parts) in general, name
        for theirs in names.of(kind).by_name[".".join(parts)].gguf:
            assert theirs.replace("#", "0").rpartition(".")[0] in known
            assert hf_name(theirs.replace("#", "7"), kind)[0] == ".".join(parts).replace("#", "7")


def test_a_bias_is_called_as_its_weight() -> None:
    by_meta = names.of("llama4").by_meta
    stem = "vision_embeddings.vision_encoder.transformer.resblocks.#.attn."
    for name, ours, weight, bias in (("wq", "q_proj", 0, 0), ("wo", "o_proj", 1, None)):
        (one,), (other,) = by_meta[f"{stem}{name}.weight"], by_meta[f"{stem}{name}.bias"]
        assert (one.split, other.split) == (weight, bias)
        assert other.name == f"vision_model.model.layers.#.self_attn.{ours}.bias"
    (norm,) = by_meta["layers.#.attention.wqkv.layer_norm_weight"]
    assert norm.name == "model.layers.#.input_layernorm.weight"
    assert [one.name[-13:] for one in by_meta["layers.#.attention.wqkv.weight"]] == [
        "q_proj.weight", "k_proj.weight", "v_proj.weight"]

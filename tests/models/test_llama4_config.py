"""Configs that are no Llama 4: every one is named."""

import pytest
from transformers import Llama4Config, Llama4TextConfig

from vicugna import models
from vicugna.errors import VicugnaError

TEXT = Llama4TextConfig(vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=16, intermediate_size=40,
                        intermediate_size_mlp=72, num_local_experts=4).to_dict()
VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "projector_input_dim": 24,
        "projector_output_dim": 24, "vision_output_dim": 24}

BAD = {
    "chunk": ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
    "experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    "floor": ({"floor_scale": 0}, "floor_scale is 0"),
    "interval": ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    "short list": ({"no_rope_layers": [1, 0]}, "each of 4 layers"),
    "kinds": ({"layer_types": ["sliding_attention"] * 4}, "each of 4 layers"),
    "experts' layers": ({"moe_layers": ["first"]}, "moe_layers"),
    "act": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "rope": ({"rope_parameters": {"rope_type": "wobbly", "factor": 2.0}}, "wobbly"),
}


@pytest.mark.parametrize("changes, words", BAD.values(), ids=BAD)
def test_impossible_text_configs_are_named(changes, words):
    config = {**TEXT, **changes}
    for whole in (config, {"model_type": "llama4", "text_config": config, "vision_config": VISION}):
        with pytest.raises(VicugnaError, match=words):
            models.build(whole)


BAD_VISION = {
    "ratio": ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio 0.4"),
    "side": ({"image_size": 20}, "a side of 5 patches"),
    "no patch": ({"image_size": 3}, "a side of 0 patches"),
    "heads": ({"num_attention_heads": 3}, "divisible by 4"),
    "adapter": ({"intermediate_size": 100}, "the adapter needs 128"),
    "projector": ({"projector_input_dim": 16}, "the adapter needs 24"),
    "output": ({"vision_output_dim": 16}, "the adapter needs 24"),
    "act": ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    "eps": ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
    "bias": ({"multi_modal_projector_bias": True}, "multi_modal_projector_bias"),
    "rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scaled"),
    "type": ({"image_size": [24, 24]}, "not of type int"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
}


@pytest.mark.parametrize("changes, words", BAD_VISION.values(), ids=BAD_VISION)
def test_impossible_vision_configs_are_named(changes, words):
    whole = Llama4Config(text_config=TEXT, vision_config=VISION).to_dict()
    whole["vision_config"] = {**whole["vision_config"], **changes}
    with pytest.raises(VicugnaError, match=words):
        models.build(whole)


def test_a_config_that_is_no_mapping_is_named():
    with pytest.raises(VicugnaError, match="not a mapping"):
        models.build({"model_type": "llama4", "text_config": [], "vision_config": 3})

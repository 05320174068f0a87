"""A tiny checkpoint of every architecture, as transformers writes it."""

from pathlib import Path

import pytest
import torch
import transformers

from vicugna import checkpoint, models
from vicugna.errors import VicugnaError

SIZES = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA4 = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 3,
          "interleave_moe_layer_step": 2, "attention_chunk_size": 16}
EYES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "projector_input_dim": 24,
        "projector_output_dim": 24, "vision_output_dim": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "image_size": 28,
           "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
CONFIGS = {
    "llama": {**SIZES, "rope_parameters": LLAMA3, "attention_bias": True, "pretraining_tp": 2},
    "mistral": {**SIZES, "sliding_window": 16, "tie_word_embeddings": True},
    "ministral": {**SIZES, "sliding_window": 16, "head_dim": 8,
                  "layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": {**SIZES, "head_dim": 8},
    "mistral3": {"text_config": {**SIZES, "model_type": "mistral", "head_dim": 8},
                 "vision_config": PIXTRAL, "tie_word_embeddings": False},
    "mixtral": {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "deepseek_v3": {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 18,
                    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
                    "n_routed_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3,
                    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "llama4_text": LLAMA4,
    "llama4": {"text_config": LLAMA4, "vision_config": EYES, "image_token_index": 90,
               "boi_token_index": 88, "eoi_token_index": 89},
}
OURS = {"model_type": "vicugna", **SIZES, "head_dim": 8, "num_experts": 4}
EVERY = [*CONFIGS, "vicugna"]


def auto(kind: str):
    """transformers' class that loads a checkpoint of this kind."""
    return (transformers.AutoModelForImageTextToText if kind in ("llama4", "mistral3")
            else transformers.AutoModelForCausalLM)


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Write a checkpoint with random weights into `folder`; the model that was written."""
    torch.manual_seed(0)
    if kind == "vicugna":
        model = models.build(OURS)
        models.initialise(model, 0)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        checkpoint.Checkpoint(model, None, {"eos_token_id": 2}).save(folder)
        return model
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    model = auto(kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.data = parameter.normal_(std=0.2).to(dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # float32 whatever the rest is
                buffer.normal_()
    model.save_pretrained(folder)
    return model


def fails(folder: Path, says: str) -> None:
    """Loading refuses with one line that holds `says` and names the folder."""
    with pytest.raises(VicugnaError) as caught:
        checkpoint.read(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)

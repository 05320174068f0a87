"""Tiny models for GGUF, their tokenizers, and GGUF files as others write them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from vicugna import checkpoint, models, tokenizer
from vicugna.errors import VicugnaError

TEXTS = ["The old teacher bought 12 pillows, isn't it?\n\n  Then\tleft.", "naïve café 東京 🦙🦙",
         "", " a  b", "<|eot_id|>def f(x):\r\n    return x**2"]
SHAPE = {"vocab_size": 610, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
         "bos_token_id": 590, "eos_token_id": 591}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LLAMA4 = {"model_type": "llama4_text", "head_dim": 16, "intermediate_size": 64,
          "intermediate_size_mlp": 96, "num_hidden_layers": 4, "num_local_experts": 6,
          "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
DEEPSEEK = {"model_type": "deepseek_v3", "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8,
            "v_head_dim": 24, "moe_intermediate_size": 32, "n_routed_experts": 8,
            "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 500000.0},
    "llama 3.1": {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 24},
    "llama linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear",
                                                             "factor": 4.0}},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 yarn": {"model_type": "qwen2", "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama4": LLAMA4,
    "llama4 3.1": LLAMA4 | {"rope_scaling": LLAMA3, "tie_word_embeddings": True,
                            "interleave_moe_layer_step": 1, "num_experts_per_tok": 2,
                            "num_hidden_layers": 4},
    "deepseek": DEEPSEEK,
    "deepseek lite": DEEPSEEK | {"q_lora_rank": None, "norm_topk_prob": False, "n_group": 4,
                                 "topk_group": 4, "n_shared_experts": 2, "rope_theta": 5e4,
                                 "num_experts_per_tok": 2},
    "deepseek yarn": DEEPSEEK | {"tie_word_embeddings": True, "rope_interleave": False,
                                 "first_k_dense_replace": 0, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 0.707, "mscale_all_dim": 0.707}},
}


def learned() -> tokenizer.Tokenizer:
    """Our own kind of tokenizer, of 600 tokens: 590 begins a text, 591 and 594 end it."""
    return tokenizer.train([Path(__file__).read_text(), Path(tokenizer.__file__).with_name(
        "bpe.py").read_text()], 600)


def network_of(changes: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    network = models.build({**SHAPE, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name:
                parameter.add_(1)
            parameter.data = parameter.to(dtype)
        for buffer in network.buffers():  # by which routers choose: float32 whatever the rest is
            buffer.normal_(std=0.1, generator=generator)
    return network.eval()


def folder_of(path: Path, changes: dict, tok: tokenizer.Tokenizer | None,
              dtype: torch.dtype = torch.float32) -> Path:
    checkpoint.Checkpoint(network_of(changes, dtype), tok, {
        "eos_token_id": [591, 594], "bos_token_id": 590}).save(path)
    return path


def same(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> None:
    """The two are one model, to the last bit and dtype."""
    first, second = (checkpoint.named_tensors(one.network) for one in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        assert torch.equal(second[name], tensor), name
    assert a.network.config == b.network.config
    assert a.generation_config == b.generation_config
    assert a.digest == b.digest


def rewritten(path: Path, to: Path, drop=("vicugna.", "tokenizer.huggingface"), tensors=None,
              **changes) -> Path:
    """Copy a GGUF file through the package, without our own keys, some keys or tensors changed
    (None: left out; bytes of blocks with their type)."""
    tensors = tensors or {}
    reader = gguf.GGUFReader(path)
    keys = {name: field for name, field in reader.fields.items()
            if not name.startswith(("GGUF.", "general.architecture", *drop))}
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for name, field in keys.items():
        if name not in changes:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in changes.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        elif isinstance(new := tensors[tensor.name], tuple):
            writer.add_tensor(tensor.name, new[0], raw_dtype=new[1])
        elif new is not None:
            writer.add_tensor(tensor.name, new)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):
        write()
    return to


def sentencepiece(prefix: bool) -> tokenizer.Tokenizer:
    """A tokenizer of Llama 2's kind, learned from these tests."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers import models as kinds
    raw = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), *last])
    marks = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, max_token_length=12,
                                  special_tokens=[*marks, *(f"<0x{i:02X}>" for i in range(256))])
    raw.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    content = json.loads(raw.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    mark = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [mark, text[0]], "pair": [mark, *text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return tokenizer.Tokenizer.of(json.dumps(content), {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, None)


def fails(path: Path, says: str) -> None:
    with pytest.raises(VicugnaError) as caught:
        checkpoint.read(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

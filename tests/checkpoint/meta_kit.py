"""Small checkpoints in the form of Meta's files, sharded here by hand."""

import io
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from vicugna import checkpoint
from vicugna.checkpoint.meta import params as meta_params
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
VISION = {"image_size": {"height": 16, "width": 16}, "patch_size": {"height": 4, "width": 4},
          "dim": 32, "n_layers": 2, "n_heads": 4, "mlp_ratio": 4.0, "output_dim": 48,
          "pixel_shuffle_ratio": 0.5}
PARAMS4 = {**PARAMS, "vocab_size": 7, "n_kv_heads": 4, "n_layers": 4, "ffn_exp": 4,
           "ffn_dim_multiplier": 1.2, "rope_theta": 500000.0, "attention_chunk_size": 8,
           "nope_layer_interval": 4, "use_qk_norm": True, "use_scaled_rope": False}


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
    checkpoint.Checkpoint(read.network, None, {}, read.origin).save(folder)
    found = transformers.AutoConfig.from_pretrained(folder)
    assert type(found) is type(due)
    assert meaning(found.to_dict()) == meaning(due.to_dict())


def meaning(config: dict) -> dict:
    notes = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
             "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "use_cache"}
    return {key: meaning(value) if isinstance(value, dict) else value
            for key, value in config.items() if key not in notes}


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


def one_layer(params: dict) -> dict[str, Tensor]:
    """Random tensors of a model of one layer, by their names in Hugging Face's form."""
    p, generator = meta_params.Params(**params), torch.Generator().manual_seed(0)
    D, GK, F = p.dim, p.groups * p.head_width, p.ffn_width()
    shapes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (GK, D), "self_attn.v_proj": (GK, D),
              "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
              "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()} | {
        "model.embed_tokens.weight": (p.vocab_size, D), "model.norm.weight": (D,),
        "lm_head.weight": (p.vocab_size, D)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}

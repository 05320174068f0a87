"""`vicugna info`: the facts of checkpoints in every form, from headers; the digest of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vicugna
from vicugna import checkpoint, models
from vicugna.checkpoint.convert import convert
from vicugna.checkpoint.gguf.file import type_name
from vicugna.checkpoint.hf import weights
from vicugna.tokenizer import Tokenizer, train

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {},
    "ministral3": {},
    "llama4_text": {"num_local_experts": 3, "head_dim": 4, "intermediate_size_mlp": 20},
    "vicugna": {"num_experts": 3, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 6, "kv_lora_rank": 8, "v_head_dim": 4,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "moe_intermediate_size": 10,
                    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                    "first_k_dense_replace": 1}}


def write(folder: Path, kind: str, tok: Tokenizer | None = None, **changes: Any) -> Path:
    """A checkpoint with random weights in bfloat16."""
    network = models.build({"model_type": kind, **SHAPE, **KINDS[kind], **changes})
    models.initialise(network, seed=1)
    for parameter in network.parameters():  # and no buffer
        parameter.data = parameter.data.bfloat16()
    checkpoint.Checkpoint(network, tok).save(folder)
    return folder


def facts_of(cli: Any, *arguments: object) -> dict[str, Any]:
    ended = cli("info", *arguments, "--json")
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1 and not ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_and_digest_are_those_of_loading(kind: str, tmp_path: Path, cli: Any) -> None:
    folder = write(tmp_path / "m", kind)
    loaded, facts = vicugna.load(folder, "auto"), facts_of(cli, folder)
    assert facts["digest"] == loaded.digest
    assert facts["parameters"] == sum(p.numel() for p in loaded.network.parameters())
    assert (facts["active_per_token"] < facts["parameters"]) == bool(KINDS[kind] and kind != "tied")
    assert facts["model_type"] == loaded.config.to_dict()["model_type"]
    assert (facts["layers"], facts["width"]) == (2, 16)
    assert facts["context"] == (16 * 16384 if kind == "ministral3" else 128)  # its default YaRN
    assert facts["dtypes"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["tokenizer"] is None and not facts["chat_template"]


def test_shards_and_order_change_nothing(tmp_path: Path, cli: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    one = facts_of(cli, write(tmp_path / "one", "mixtral"))
    monkeypatch.setattr(weights, "SHARD_BYTES", 4000)
    many = facts_of(cli, write(tmp_path / "many", "mixtral"))
    assert one["files"] == 1 and many["files"] > 3
    assert {**one, "files": 0} == {**many, "files": 0}


def test_experts_stored_as_one_tensor(tmp_path: Path, cli: Any) -> None:
    """A stack and its pieces are the same model."""
    folder = write(tmp_path / "m", "mixtral")
    before, state = facts_of(cli, folder)["digest"], load_file(folder / "model.safetensors")
    for layer in range(2):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        state[f"{stem}.down_proj"] = torch.stack(
            [state.pop(f"{stem}.{expert}.w2.weight") for expert in range(4)])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert facts_of(cli, folder)["digest"] == before == vicugna.load(folder, "auto").digest


def test_extra_tensors_count_in_the_digest(tmp_path: Path, cli: Any) -> None:
    folder = write(tmp_path / "m", "deepseek_v3")
    before, state = facts_of(cli, folder), load_file(folder / "model.safetensors")
    state["model.layers.2.eh_proj.weight"] = torch.ones(3, 5)  # predicts further tokens
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    after = facts_of(cli, folder)
    assert after["digest"] == vicugna.load(folder, "auto").digest != before["digest"]
    assert after["parameters"] == before["parameters"] and after["tensors"] == len(state)


def test_several_dtypes_have_no_digest(tmp_path: Path, cli: Any) -> None:
    folder = write(tmp_path / "m", "llama")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    facts = facts_of(cli, folder)
    assert set(facts["dtypes"]) == {"bfloat16", "float32"} and facts["digest"] is None


def test_gguf(tmp_path: Path, cli: Any) -> None:
    pytest.importorskip("gguf")
    tok = train([Path(__file__).read_text()], 300)
    folder = write(tmp_path / "m", "llama", tok, vocab_size=300, hidden_size=32,
                   intermediate_size=64)
    path = tmp_path / "m.gguf"
    for dtype, held in (("bfloat16", {"bfloat16", "float32"}), ("q8_0", {"Q8_0", "float32"})):
        path.unlink(missing_ok=True)
        convert(folder, path, dtype=dtype, lossy=True)
        facts = facts_of(cli, path)
        assert facts["digest"] == vicugna.load(path, "auto").digest
        assert set(facts["dtypes"]) == held and facts["format"] == "gguf"
        assert facts["parameters"] == facts_of(cli, folder)["parameters"]
    (tmp_path / "sha256-00").write_bytes(path.read_bytes())  # as Ollama's blobs are called
    assert facts_of(cli, tmp_path / "sha256-00") == facts
    (folder / "m.gguf").write_bytes(path.read_bytes())
    assert facts_of(cli, folder)["format"] == "safetensors"


def test_every_ggml_type_has_its_name(tmp_path: Path, cli: Any) -> None:
    """Of those of the package gguf, and of those that GGML had once."""
    gguf = pytest.importorskip("gguf")
    for kind in gguf.GGMLQuantizationType:
        assert type_name(int(kind)) == kind.name
    assert not [n for n in range(max(gguf.GGMLQuantizationType) + 1) if "type" in type_name(n)]
    folder = write(tmp_path / "m", "llama", None, vocab_size=300, hidden_size=32,
                   intermediate_size=64)
    convert(folder, tmp_path / "a.gguf")
    for kind in map(gguf.GGMLQuantizationType.__getitem__, ("Q4_1", "Q5_0", "Q5_1")):
        requantise(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
        assert kind.name in facts_of(cli, tmp_path / "b.gguf")["dtypes"]
        assert f"{kind.name}: " in cli("info", tmp_path / "b.gguf").out


def test_how_a_model_is_kept_to_run(tmp_path: Path, cli: Any) -> None:
    """Of every kind of tensor: what the file holds, what is kept, why, and its bytes."""
    folder = write(tmp_path / "m", "llama", None, vocab_size=300, hidden_size=32,
                   intermediate_size=64)
    convert(folder, tmp_path / "m.gguf", dtype="q4_0", lossy=True)

    def kept(*arguments: object) -> dict[str, tuple[str, str]]:
        said = json.loads(cli("info", *arguments, "--run", "--json").out)
        assert said["weight_bytes"] == sum(one["bytes"] for one in said["tensors"])
        return {one["tensor"]: (one["stored"], one["kept"]) for one in said["tensors"]}

    down, norm = "model.layers.#.mlp.down_proj.weight", "model.norm.weight"
    found = kept(tmp_path / "m.gguf")
    assert found[down] == ("q4_0", "q4_0") and found[norm] == ("float32", "float32")
    assert kept(tmp_path / "m.gguf", "--weights", "float")[down] == ("q4_0", "float32")
    assert kept(folder)[down] == ("bfloat16", "float32")
    assert kept(folder, "--weights", "int8")[down] == ("bfloat16", "q8_0")
    shown = cli("info", tmp_path / "m.gguf", "--run").out
    assert "as the file has it" in shown and "bytes of weights" in shown


def requantise(source: Path, target: Path, kind: Any) -> None:
    """The same file with its matrices in another GGML type."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name not in ("general.architecture",) and not field.name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metas_files(tmp_path: Path, cli: Any) -> None:
    """One shard, made by hand; norms and projections keep Meta's names."""
    D, F, V = 16, 24, 40
    shapes = {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}
    for name, shape in {"attention.wq": (D, D), "attention.wk": (D, D), "attention.wv": (D, D),
                        "attention.wo": (D, D), "feed_forward.w1": (F, D),
                        "feed_forward.w3": (F, D), "feed_forward.w2": (D, F),
                        "attention_norm": (D,), "ffn_norm": (D,)}.items():
        shapes |= {f"layers.{n}.{name}.weight": shape for n in range(2)}
    torch.manual_seed(0)
    torch.save({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()},
               tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps({
        "dim": D, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "multiple_of": 8,
        "vocab_size": V, "ffn_dim_multiplier": 0.5}))
    facts = facts_of(cli, tmp_path)
    assert facts["digest"] == vicugna.load(tmp_path, "auto").digest
    assert facts["model_type"] == "llama" and facts["format"] == "pth" and facts["files"] == 1
    assert facts["dtypes"] == {"bfloat16": 2 * facts["parameters"]}
    planned = json.loads(cli("plan", tmp_path, "--json").out)
    assert planned["parameters"]["total"] == facts["parameters"]


def test_block_scaled_fp8(tmp_path: Path, cli: Any) -> None:
    folder = write(tmp_path / "m", "llama")
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "proj" in name]:
        rows, columns = (-(-size // 8) for size in state[name].shape)
        state[name + "_scale_inv"] = torch.full((rows, columns), 0.5)
        state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic",
                                     "weight_block_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    facts = facts_of(cli, folder)
    assert set(facts["dtypes"]) == {"float8_e4m3fn", "bfloat16", "float32"}
    assert facts["digest"] == vicugna.load(folder, "auto").digest


def test_a_large_checkpoint_is_not_read(tmp_path: Path, cli: Any) -> None:
    """A hole of 20 GB for a file: only its header takes part."""
    folder = write(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 2**20, "hidden_size": 4096, "head_dim": 4, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        state = models.build(config).state_dict()
    header, offset = {}, 0
    for name, tensor in state.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape),
                        "data_offsets": [offset, offset := offset + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    facts = facts_of(cli, folder, "--no-digest")
    assert facts["dtypes"] == {"bfloat16": offset} and offset > 16e9 and "digest" not in facts


def test_tokenizer_and_table(tmp_path: Path, cli: Any) -> None:
    tok = train([Path(__file__).read_text()], 300)
    folder = write(tmp_path / "m", "vicugna", tok, vocab_size=300)
    facts, ended = facts_of(cli, folder), cli("info", folder)
    assert facts["tokenizer"] == tok.digest and facts["tokens"] == 300 and facts["chat_template"]
    assert facts["digest"] == vicugna.load(folder, "auto").digest
    assert ended.code == 0
    for words in ("active per token", "chat template", facts["digest"], tok.digest):
        assert words in ended.out


@pytest.mark.parametrize(("change", "word"), [
    ({"intermediate_size": 25}, "wrong shape"), ({"num_hidden_layers": 1}, "unexpected"),
    ({"num_hidden_layers": 3}, "missing"), ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"model_type": "lama"}, "Did you mean 'llama'")])
def test_a_config_of_another_model(change: dict[str, Any], word: str, tmp_path: Path, cli: Any
                                   ) -> None:
    folder = write(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    ended = cli("info", folder, "--no-digest")
    assert ended.code == 2 and word in ended.line


def test_weights_that_are_not_numbers(tmp_path: Path, cli: Any) -> None:
    folder = write(tmp_path / "m", "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    ended = cli("info", folder)
    assert ended.code == 2 and "1 of 384 values are NaN" in ended.line and "up_proj" in ended.line

"""What is not a checkpoint of any form that is read is named for what it is, with what to do."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from every import save

from vicugna import checkpoint
from vicugna.checkpoint.convert import convert
from vicugna.errors import VicugnaError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def error(path: Path) -> str:
    with pytest.raises(VicugnaError) as caught:
        checkpoint.survey(path)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said and "ownload or write" not in said
    return said


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save("llama", folder := tmp_path_factory.mktemp("foreign") / "m")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A readable checkpoint, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "m"))


@pytest.mark.parametrize(("names", "says", "fix"), [
    (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "an adapter (LoRA)",
     "merge_and_unload()"),
    (["adapter_model.bin", "README.md"], "an adapter (LoRA)", "merge_and_unload()"),
    (["checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors", "runs/x",
      "training_args.bin"], "a trainer's output", "Name one of them: {}/checkpoint-10"),
    (["stage.json", "release/config.json"], "a stage of a run", "or its release: {}/release"),
    (["run.json", "01-pretrain/stage.json"], "a run, not a model", "{}/NN-NAME/checkpoint"),
    (["stage.json", "checkpoint/config.json"], "a stage of a run", "{}/checkpoint"),
    (["config.json", "pytorch_model_fsdp_0/__0_0.distcp"], "sharded training state", "accelerate"),
    (["__0_0.distcp", ".metadata"], "sharded training state", "accelerate"),
    (["global_step5/x.pt", "zero_to_fp32.py", "latest"], "DeepSpeed", "zero_to_fp32.py"),
    (["model_index.json", "unet/config.json"], "a pipeline of diffusers", "a language model"),
    (["modules.json", "config.json"], "an embedding model", "a language model"),
    (["blobs/x", "refs/main", "snapshots/a/config.json"], "the Hub's cache", "Hub id"),
    (["blobs/sha256-00", "manifests/x"], "the store of Ollama", "ollama show"),
    (["model.onnx", "config.json", "tokenizer.json"], "an export to ONNX", "safetensors"),
    (["onnx/model.onnx", "config.json"], "an export to ONNX", "safetensors"),
    (["openvino_model.xml", "config.json"], "another framework", "safetensors"),
    (["tf_model.h5", "config.json"], "another framework (tf_model.h5)", "safetensors"),
    (["weights.npz", "config.json"], "another framework", "safetensors"),
    (["pytorch_model.bin", "config.json"], "refused: only safetensors", "save_pretrained()"),
    (["model.pth"], "refused: only safetensors", "save_pretrained()"),
    (["gptq_model-4bit.safetensors", "quantize_config.json", "config.json"], "GPTQ", "unquantised"),
    (["consolidated.safetensors", "params.json"], "Mistral publishes its models", "config.json"),
    (["other.safetensors", "config.json"], "another name than model.safetensors (other", "Name"),
    (["model.zip"], "an archive (model.zip)", "Unpack"),
    (["tokenizer.json", "tokenizer_config.json"], "a tokenizer alone", "config.json"),
    ([], "no model in it", "config.json"),
    (["notes.txt"], "no model in it", "config.json"),
])
def test_folders(tmp_path: Path, names: list[str], says: str, fix: str) -> None:
    for name in names:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text("{}")
    (tmp_path / "f").mkdir(exist_ok=True)
    said = error(tmp_path / "f")
    assert says in said and fix.format(tmp_path / "f") in said


def test_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VicugnaError, match=r"neither model\.safetensors nor"):
        checkpoint.survey(tmp_path)


def test_an_adapter_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    assert "(LoRA), not a whole model, for org/base." in error(tmp_path)
    for broken in ("[", "[1]", '{"base_model_name_or_path": "a\\nb"}'):
        (tmp_path / "adapter_config.json").write_text(broken)
        assert "not a whole model. Merge" in error(tmp_path)


def test_a_model_beside_training_files_is_read(folder: Path) -> None:
    """A trainer's output whose last model is there, and merged weights beside their adapter."""
    digest = checkpoint.read(folder).digest
    (folder / "checkpoint-5").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "adapter_config.json"):
        (folder / name).write_text("{}")
    assert checkpoint.read(folder).digest == digest


@pytest.mark.parametrize(("config", "says"), [
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantised (MLX, 4 bits)"),
    ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "quantised (MLX, 4 bits)"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (GPTQ)"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised (AWQ)"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised (bitsandbytes)"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised (compressed-ten"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised (mxfp4)"),
])
def test_quantised_weights(folder: Path, config: dict, says: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(4, 4, dtype=torch.uint32)  # MLX's packed values
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    said = error(folder)
    assert says in said and "Use the unquantised checkpoint, or a GGUF file" in said


def test_a_classifier(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    assert "a classifier (LlamaForSequenceClassification): it has no language-" in error(folder)


def test_an_embedding_model_with_weights(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    assert "an embedding model" in error(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS)
    with pytest.raises(VicugnaError, match=rf"{name}: a pointer of Git LFS.*git lfs pull"):
        checkpoint.survey(folder)


def packed(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("m/config.json", "{}")
    else:
        with tarfile.open(fileobj=out, mode=f"w:{kind}") as archive:
            archive.addfile(tarfile.TarInfo("m/config.json"))
    return out.getvalue()


MANIFEST = json.dumps({"schemaVersion": 2, "layers": [
    {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "ab" * 32}]})


@pytest.mark.parametrize(("name", "content", "says", "fix"), [
    ("m.zip", packed("zip"), "an archive", "Unpack it"),
    ("m", packed("zip"), "an archive", "Unpack it"),
    ("m.tar.gz", packed("gz"), "an archive", "Unpack it"),
    ("m.tar", packed(""), "an archive", "Unpack it"),
    ("pytorch_model.bin", packed("zip"), "refused: only safetensors", "safetensors form"),
    ("m.pt", b"", "refused: only safetensors", "safetensors form"),
    ("m.onnx", b"\x08\x07", "an export to ONNX", "safetensors form"),
    ("m.h5", b"\x89HDF", "another framework", "safetensors form"),
    ("ggml-model.bin", b"tjgg\3", "refused", "safetensors"),
    ("ggml-model", b"tjgg\3", "before GGUF", "as GGUF"),
    ("m.gguf", LFS.encode(), "a pointer of Git LFS", "git lfs pull"),
    ("model.safetensors", LFS.encode(), "a pointer of Git LFS", "git lfs pull"),
    ("model.safetensors", b"\0" * 9, "one file of a checkpoint", "Name the folder"),
    ("model-00001-of-00002.safetensors", b"", "one file of a checkpoint", "Name the folder"),
    ("adapter_model.safetensors", b"", "an adapter (LoRA)", "merge_and_unload()"),
    ("latest", MANIFEST.encode(), "a manifest of Ollama", "sha256-" + "ab" * 32),
    ("Modelfile", b"# mine\nFROM ./m.gguf\n", "a Modelfile", "after its FROM"),
    ("config.json", b"{}", "a file, not a folder", "folder which holds config.json"),
    ("notes.txt", b"FROMAGE", "a file, not a folder", "folder which holds config.json"),
])
def test_files(tmp_path: Path, name: str, content: bytes, says: str, fix: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = error(tmp_path / name)
    assert says in said and fix in said


# GGUF by its bytes, and in folders.

def test_gguf_is_known_by_its_first_bytes(folder: Path, tmp_path: Path) -> None:
    """As Ollama's blobs and downloads without an ending are."""
    convert(folder, tmp_path / "m.gguf")
    digest = checkpoint.read(tmp_path / "m.gguf").digest
    for name in ("sha256-" + "0" * 64, "m.bin", "m.GGUF"):
        shutil.copy(tmp_path / "m.gguf", tmp_path / name)
        assert checkpoint.read(tmp_path / name).digest == digest
    (tmp_path / "link").symlink_to("m.gguf")
    assert checkpoint.read(tmp_path / "link").digest == digest
    (tmp_path / "x.gguf").write_bytes(b"GGML" + b"\0" * 99)
    with pytest.raises(VicugnaError, match=r"x\.gguf: not a GGUF file"):
        checkpoint.read(tmp_path / "x.gguf")


def test_a_folder_with_one_gguf_is_that_file(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    place.mkdir()
    convert(folder, place / "model-f32.gguf")
    shutil.copy(folder / "config.json", place)  # as on the Hub
    (place / "README.md").write_text("x")
    digest = checkpoint.read(place / "model-f32.gguf").digest
    assert checkpoint.read(place).digest == digest
    (place / "mmproj-f16.gguf").write_bytes(b"GGUF")  # the vision encoder is not the model
    assert checkpoint.read(place).digest == digest
    shutil.copy(place / "model-f32.gguf", place / "model-q8_0.gguf")
    said = error(place)
    assert "2 GGUF files: model-f32.gguf, model-q8_0.gguf" in said
    assert f"Name one of them: {place / 'model-f32.gguf'}" in said
    shutil.copy(folder / "model.safetensors", place)  # weights in the folder's own form come first
    assert checkpoint.survey(place).folder == place


def written(path: Path, architecture: str, **keys: object) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = writer.add_uint16 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_without_its_ending(tmp_path: Path) -> None:
    """In a folder too, as in that of Ollama's blobs."""
    for number, name in enumerate(("sha256-" + "ab" * 32, "model"), start=1):
        written(tmp_path / name, "whisper")
        assert "architecture whisper is not read" in error(tmp_path / name)
        says = "architecture whisper is not read" if number == 1 else "2 GGUF files: model, sha256-"
        assert says in error(tmp_path)


def test_gguf_files_that_are_no_models(tmp_path: Path) -> None:
    for name, architecture, keys, says in (
            ("mmproj-f16.gguf", "clip", {"general__type": "mmproj"}, "the vision encoder"),
            ("old-mmproj.gguf", "clip", {}, "the vision encoder"),
            ("lora.gguf", "llama", {"general__type": "adapter"}, "a LoRA adapter"),
            ("m.imatrix.gguf", "llama", {"general__type": "imatrix"}, "an importance matrix"),
            ("whisper.gguf", "whisper", {}, "architecture whisper is not read")):
        written(tmp_path / name, architecture, **keys)
        assert says in error(tmp_path / name)
    (tmp_path / "parts").mkdir()
    for number in (1, 2):
        written(tmp_path / "parts" / f"m-0000{number}-of-00002.gguf", "llama", split__count=2)
    assert "one part of a model in several files" in error(tmp_path / "parts")
    assert "llama-gguf-split --merge" in error(tmp_path / "parts" / "m-00001-of-00002.gguf")


# Names of wrappers.

@pytest.mark.parametrize("wrapped", [
    "_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "model.{}",
    "module.model.{}", "_forward_module.model.{}", "base_model.model.{}", "module.module.{}"])
def test_names_of_what_wraps_a_model_are_taken_off(folder: Path, tmp_path: Path, wrapped: str
                                                   ) -> None:
    digest = checkpoint.read(folder).digest
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({wrapped.format(name): tensor for name, tensor in tensors.items()},
                                folder / "model.safetensors")
    read = checkpoint.read(folder)
    assert read.digest == digest
    read.save(tmp_path / "clean")
    assert safetensors.torch.load_file(tmp_path / "clean" / "model.safetensors").keys() == (
        tensors.keys() - {"lm_head.weight"} if read.config.tie_word_embeddings else tensors.keys())


def test_wrapped_layers_and_shards(folder: Path) -> None:
    """Layers compiled, sharded or checkpointed one by one; an index with such names."""
    digest = checkpoint.read(folder).digest
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = {name: name.replace("layers.0.", "layers.0._orig_mod.").replace(
        "layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        for name in tensors}
    (folder / "model.safetensors").unlink()
    safetensors.torch.save_file({names[n]: t for n, t in tensors.items()}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(names.values(), "a.safetensors")}))
    assert checkpoint.read(folder).digest == digest


def test_one_name_without_the_prefix_is_not_stripped(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = {name: f"module.{name}" if "norm" in name else name for name in tensors}
    safetensors.torch.save_file({names[n]: t for n, t in tensors.items()},
                                folder / "model.safetensors")
    with pytest.raises(VicugnaError, match="unexpected module"):
        checkpoint.read(folder)


@pytest.mark.parametrize(("before", "after", "fix"), [
    ("", "network.", "take 'network.' off"), ("", "policy.model.", "take 'policy.model.' off"),
    ("model.", "", "put 'model.' before")])
def test_any_other_prefix_is_named(folder: Path, before: str, after: str, fix: str) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    safetensors.torch.save_file({after + n.removeprefix(before): t for n, t in tensors.items()},
                                folder / "model.safetensors")
    with pytest.raises(VicugnaError, match=rf"Rename them: {fix} each of these names"):
        checkpoint.read(folder)


def test_lora_weights_that_were_not_merged(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file({f"base_model.model.{n}": t for n, t in tensors.items()},
                                folder / "model.safetensors")
    assert "was not merged" in error(folder) and "merge_and_unload()" in error(folder)
    del tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VicugnaError, match="have the same name"):
        checkpoint.survey(folder)

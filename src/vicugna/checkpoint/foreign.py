"""What is at a path that no reader recognises: its name, and what to do with it."""

import json
import re
from pathlib import Path

from vicugna.checkpoint.stored import short
from vicugna.errors import VicugnaError

LFS = b"version https://git-lfs.github.com/spec/"
SAFETENSORS = "Use its safetensors form, with config.json"
MERGE = ("Merge it into the model that it was trained on: merge_and_unload() of PEFT, then "
         "save_pretrained()")
UNPACK, NAME = "Unpack it, and name the folder", "Name the folder which holds config.json"
PICKLE = ("refused: only safetensors weights are read, since pickled files can run code when they "
          "are opened")
EMBEDDING = ("modules.json", "config_sentence_transformers.json")
# What a file or folder called so tells of the folder it is in, and what to do; the first counts.
# {last} is the one with the highest number.
SIGNS = tuple((re.compile(pattern), what, fix) for pattern, what, fix in (
    (r"adapter_(config\.json|model\.\w+)", "an adapter (LoRA), not a whole model", MERGE),
    (r"checkpoint-\d+", "a trainer's output: the models are in its folders checkpoint-N",
     "Name one of them: {last}"),
    (r"run\.json", "a run, not a model",
     "Name the checkpoint of a stage: {path}/NN-NAME/checkpoint"),
    (r"stage\.json", "a stage of a run, not a model",
     "Name its checkpoint: {path}/checkpoint, or its release: {path}/release"),
    (r"pytorch_model_fsdp_\d+|.*\.distcp|\.metadata", "sharded training state (PyTorch's DCP)",
     "Gather it first: accelerate merge-weights FOLDER OUTPUT"),
    (r"global_step\d+|zero_to_fp32\.py", "training state of DeepSpeed",
     "Gather it first: python zero_to_fp32.py FOLDER OUTPUT --safe_serialization"),
    (r"model_index\.json", "a pipeline of diffusers, for images, video or sound",
     "Name a language model"),
    ("|".join(map(re.escape, EMBEDDING)), "an embedding model "
     "(sentence-transformers), which gives vectors instead of text", "Name a language model"),
    (r"snapshots", "a model's folder in the Hub's cache",
     "Name the model by its Hub id, or a folder in {path}/snapshots"),
    (r"manifests", "the store of Ollama",
     "Name the model's blob: the line FROM of ollama show MODEL --modelfile"),
    (r"onnx|.*\.onnx(_data)?", "an export to ONNX", SAFETENSORS),
    (r"openvino_.*|.*\.(h5|msgpack|npz|tflite|mlmodelc?|mlpackage|engine|nemo|keras)",
     "weights for another framework ({last})", SAFETENSORS),
    (r"(?!training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pt|pth|pkl|pickle|ckpt)",
     PICKLE, SAFETENSORS + ": on the Hub, or written by save_pretrained() of transformers"),
    (r"quantize_config\.json|quant_config\.json", "quantised weights (GPTQ or AWQ)",
     "Use the unquantised checkpoint"),
    (r"consolidated.*\.safetensors", "the form in which Mistral publishes its models",
     "Use the files in Hugging Face's form: model.safetensors and config.json"),
    (r".*\.safetensors", "safetensors under another name than model.safetensors ({last})",
     "Name the folder with model.safetensors, or its index, and config.json"),
    (r".*\.(zip|tar|tgz|gz|xz|zst|7z|rar)", "an archive ({last})", UNPACK),
    (r"config\.json", "neither model.safetensors nor model.safetensors.index.json is there",
     "Download or write the checkpoint again"),
    (r"tokenizer(_config)?\.(json|model)|tekken\.json|vocab\.json|merges\.txt",
     "a tokenizer alone, without a model", NAME + " and weights")))
# How files begin: zip, gzip, 7z, zstandard, xz, rar; llama.cpp's ggml, ggmf, ggjt, ggla.
ARCHIVES = (b"PK\3\4", b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"Rar!")
OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")


def start(path: Path, count: int = 4) -> bytes:
    """How the file begins; OSError."""
    with open(path, "rb") as file:
        return file.read(count)


def check_pointer(path: Path) -> None:
    """Raise VicugnaError for the pointer that Git LFS puts in place of a file it did not fetch."""
    if path.stat().st_size < 1024 and start(path, len(LFS)) == LFS:
        raise VicugnaError("a pointer of Git LFS, not the file itself", str(path),
                           "Fetch it: git lfs pull, in that folder")


def explain(path: Path) -> VicugnaError:
    """The error for a file or folder that no reader recognises. OSError."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():  # a pipe would hang
        return VicugnaError("neither a folder nor a regular file", str(path), NAME)
    names = sorted((entry.name for entry in path.iterdir()),
                   key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    for pattern, what, fix in SIGNS:
        if found := [name for name in names if pattern.fullmatch(name)]:
            last = path / found[-1]
            where = last if what is PICKLE else path
            base = _base(path) if fix is MERGE else ""
            return VicugnaError(what.format(last=short(last.name)) + base, str(where),
                                fix.format(last=path / short(last.name), path=path))
    gguf = ("If it comes as GGUF, download a file: hf download ORG/NAME FILE.gguf, and name it"
            if path.parent.name == "snapshots" else NAME)
    return VicugnaError("no model in it: neither config.json nor weights are there", str(path),
                        gguf)


def _base(folder: Path) -> str:
    """Which model an adapter was trained on, if it says so."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes()[:10**6])
        base = str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f", for {base}" if base.isprintable() and len(base) < 200 else ""


def _of_file(path: Path) -> VicugnaError:
    check_pointer(path)
    head = start(path, 4096)
    if head[:1] == b"{" and b"application/vnd.ollama.image.model" in head:
        blob = re.search(rb'image\.model"[^}]*?"digest":\s*"sha256:([0-9a-f]{64})', head)
        return VicugnaError("a manifest of Ollama, not the model itself", str(path),
                            "Name its blob, in the folder blobs beside manifests: sha256-"
                            + (blob[1].decode() if blob else "..."))
    if re.search(rb"^FROM ", head, re.MULTILINE):
        return VicugnaError("a Modelfile of Ollama", str(path), "Name the file after its FROM")
    if path.suffix == ".safetensors" and not path.name.startswith("adapter_"):
        return VicugnaError("one file of a checkpoint, not the whole", str(path), "Name the folder "
                            f"with config.json and the tokenizer too: {path.parent}")
    for pattern, what, fix in SIGNS:
        if pattern.fullmatch(path.name) and not path.name.endswith(".json"):
            return VicugnaError(what.format(last=path.name), str(path),
                                fix.format(last=path, path=path.parent))
    if head.startswith(ARCHIVES):
        return VicugnaError("an archive", str(path), UNPACK)
    if head.startswith(OLD_GGML):
        return VicugnaError("a file of llama.cpp from before GGUF", str(path),
                            "Download the model as GGUF")
    return VicugnaError("a file, not a folder", str(path), NAME)

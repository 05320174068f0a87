"""The Hugging Face directory: a checkpoint as transformers, vLLM and llama.cpp know it."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.checkpoint import fit, weights
from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.weights import Stored, broken, short
from vicugna.errors import VicugnaError
from vicugna.files import (
    canonical,
    disk_errors,
    read_json,
    replacing_folder,
    sweep_temporaries,
    write_json,
)
from vicugna.tokenizer import FILES as TOKENIZERS
from vicugna.tokenizer import Tokenizer

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Of tokenizers, chat templates and processors of images: kept as they are when a model is saved.
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt",
              "chat_template.jinja", "chat_template.json", "processor_config.json",
              "preprocessor_config.json")
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
# What may stand in a folder that a checkpoint takes the place of: what one is made of, no more.
CHECKPOINT_FILE = re.compile("|".join([
    r"model(-\d+-of-\d+)?\.safetensors", r"modeling_\w+\.py",
    *map(re.escape, ("config.json", "generation_config.json", weights.INDEX, *KEPT_FILES))]))
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
JSON_BYTES, INDEX_BYTES = 10**6, 20 * 10**6  # an index of 150,000 tensors
KEPT_BYTES = 50 * 10**6  # of all of them; the largest tokenizer.json has 33
HUB_ERRORS = {
    "GatedRepoError": ("the Hub asks for an approved account", "Ask there, then: hf auth login"),
    "RepositoryNotFoundError": ("no such folder, and no such model on the Hub", "Check the name"),
    "RevisionNotFoundError": ("the Hub has no such revision of it", "Check the revision")}


@dataclass(frozen=True)
class Survey:
    """What a checkpoint says of itself: everything but the values of its weights.

    `config` is config.json as it was read, `stored` the dtype, shape and place of every tensor by
    name (an FP8 tensor's scale belongs to it), `files` the contents of KEPT_FILES.
    """

    folder: Path
    config: dict[str, Any]
    stored: dict[str, Stored]
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    files: dict[str, bytes]

    @property
    def source(self) -> Path:
        """The file that says what `config` does: Hugging Face's, Meta's, or the one of all."""
        paths = (self.folder / name for name in ("config.json", "params.json"))
        return next((path for path in paths if path.exists()), self.folder)


@dataclass
class Checkpoint:
    """A checkpoint in memory. `config` is config.json as it was read."""

    config: dict[str, Any]
    network: nn.Module
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what was loaded; taken on first use, so before training goes on."""
        config: Any = self.network.config
        return digest(fit.named_tensors(self.network), config.to_dict(), self.tokenizer,
                      self.generation_config)


def survey(path: str | Path) -> Survey:
    """The facts of the checkpoint in folder `path` (in the form of Hugging Face or of Meta) or file
    `path` (GGUF), or named by Hub id `org/name[@revision]`.

    Of the weights only the headers are read, of which nothing is believed unchecked. Nothing is
    unpickled and no code of the checkpoint is run. Raises VicugnaError.
    """
    from vicugna.checkpoint import gguf, meta  # which build on this module
    with disk_errors(path):
        folder = _locate(path)
        if is_gguf(folder) and folder.is_file():
            return gguf.survey(folder)
        if original := meta.find(folder):
            return meta.survey(original)
        config = read_object(folder, "config.json")
        block = _fp8_block(config, folder)
        stored = weights.scaled(_scan(folder), block)
        generation_config = (read_object(folder, "generation_config.json")
                             if os.path.lexists(folder / "generation_config.json") else {})
        files = _kept_files(folder)
        tokenizer = Tokenizer(folder) if files.keys() & set(TOKENIZERS) else None
        return Survey(folder, config, stored, tokenizer, generation_config, files)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu") -> Checkpoint:
    """Read the checkpoint in folder `path`, or named by Hub id `org/name[@revision]`.

    Parameters become `dtype`; None keeps what is stored. Buffers keep the network's own dtype.
    Weights stay a private mapping of their files where neither dtype nor device changes; NaN in
    large ones is reported when the network first runs. What the folder says besides (a Survey)
    stays in `network.origin`, for `write`. Raises VicugnaError.
    """
    found = survey(path)
    with disk_errors(path):
        network: Any = fit.build(found.config, found.stored, str(found.source))
        fit.fill(network, found.stored, dtype, torch.device(device), found.folder)
    network.origin = replace(found, stored={})
    return Checkpoint(found.config, network, found.tokenizer, found.generation_config)


def is_gguf(path: Path) -> bool:
    """Whether `path` is called what GGUF files are."""
    return path.suffix.lower() == ".gguf"


def _locate(path: str | Path) -> Path:
    """The local folder of a checkpoint: `path` itself, or a Hub snapshot of the id it names."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir() or (is_gguf(folder) and folder.is_file()):
        return folder
    if folder.exists():
        raise _refusal(folder) if folder.suffix in PICKLES else VicugnaError(
            "a file, not a folder", str(path), "Name the folder which holds config.json")
    if hub_id := HUB_ID.fullmatch(str(path)):
        return _download(hub_id[1], hub_id[2])
    raise VicugnaError("no such folder", str(path), "Check the path, or name a Hub id: org/name")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES,
                                      ignore_patterns="*/*"))
    except (OSError, RuntimeError, ValueError) as error:  # no network, offline mode, HTTP errors
        what, fix = HUB_ERRORS.get(type(error).__name__, (
            "no such folder, and the Hub could not be reached",
            "Check the path, or connect to the network and try again"))
        where = f"{name}@{revision}" if revision else name
        raise VicugnaError(what, where, fix) from error


def _inside(folder: Path, name: str) -> Path:
    """`folder/name`, which must not lead out of the folder, by its name or by a symbolic link."""
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except RuntimeError as error:  # links in a circle
        raise broken(f"cannot be followed: {error}", f"{folder}/{name}") from error
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")  # where the Hub's cache keeps the files
    if (".." in PurePosixPath(name).parts or name.startswith("/")
            or not any(map(target.is_relative_to, roots))):
        raise VicugnaError(f"{name!r} leads out of the folder", str(folder),
                           "Put the file itself there, if you trust where it comes from")
    if not target.is_file():  # a pipe would hang
        raise broken("no such file, or not a regular one", folder / name)
    return folder / name


def read_object(folder: Path, name: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the regular file `folder/name`, of at most `limit` bytes. VicugnaError for
    any other file, one that a link leads to out of the folder, and values outside JSON."""
    path = _inside(folder, name)
    if path.stat().st_size > limit:
        raise broken(f"over {limit:,} bytes", path)
    value = read_json(path)
    if not isinstance(value, dict):
        raise broken("not a JSON object", path)
    try:
        canonical(value)
    except ValueError as error:  # NaN, infinity, half of a surrogate pair: no JSON has them
        raise broken(f"holds a value outside JSON: {error}", path) from error
    return value


def _kept_files(folder: Path) -> dict[str, bytes]:
    """The contents of those of KEPT_FILES, and further templates, that are there."""
    extra = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{TEMPLATES}/*"))
    found = [_inside(folder, name) for name in (*KEPT_FILES, *extra)
             if os.path.lexists(folder / name)]
    if sum(path.stat().st_size for path in found) > KEPT_BYTES:
        longest = max(found, key=lambda path: path.stat().st_size)
        raise broken(f"over {KEPT_BYTES:,} bytes with the rest of the tokenizer", longest)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _fp8_block(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a block-scaled FP8 checkpoint; None if not quantised.
    VicugnaError for other kinds of quantised weights."""
    how = config.get("quantization_config")
    if how is None:
        return None
    how = how if isinstance(how, dict) else {"quant_method": how}
    kind, block = how.get("quant_method"), how.get("weight_block_size")
    if ((kind, how.get("activation_scheme")) == ("fp8", "dynamic") and isinstance(block, list)
            and len(block) == 2 and all(type(n) is int and 1 <= n <= 4096 for n in block)):
        return block[0], block[1]
    raise VicugnaError(f"its weights are quantised ({short(str(kind))}), which is not read",
                       str(folder), "Use the unquantised checkpoint, or one in FP8 whose "
                       "weight_block_size is two sizes and activation_scheme dynamic")


def _scan(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers of its safetensors files, each of which is
    inside the folder and holds what the index says."""
    if os.path.lexists(folder / weights.SINGLE):
        return weights.scan([_inside(folder, weights.SINGLE)])
    if not (folder / weights.INDEX).exists():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise _refusal(pickles[0]) if pickles else broken(
            f"neither {weights.SINGLE} nor {weights.INDEX} is there", folder)
    shards = read_object(folder, weights.INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(
            isinstance(name, str) and name.isprintable() and len(name) < 256
            for name in shards.values()):
        raise broken("weight_map does not give each tensor a file", folder / weights.INDEX)
    names = sorted(set(shards.values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        raise _refusal(folder / others[0])
    found = weights.scan([_inside(folder, name) for name in names])
    for name, file in shards.items():
        if name not in found or found[name].file != folder / file:
            raise broken(f"weight_map gives {short(name)} to {file}, which does not hold it",
                         folder / weights.INDEX)
    return found


def _refusal(path: Path) -> VicugnaError:
    return VicugnaError("refused: only safetensors weights are read, since pickled files can run "
                        "code when they are opened", str(path),
                        "Use the safetensors form of this checkpoint")


def default_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json of a model that ends its text where its tokenizer says."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id,
                                         "eos_token_id": list(tokenizer.eos_ids),
                                         "pad_token_id": tokenizer.pad_id}


def write(folder: str | Path, network: nn.Module, tokenizer: Tokenizer | None,
          generation_config: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint into `folder`, whole or not at all, replacing a checkpoint there.

    The same model gives the same bytes. `generation_config` None is made from the tokenizer. Of a
    network that was read from a checkpoint, config.json keeps the keys that are not modelled here,
    and its tokenizer's files stay as they were.
    Raises VicugnaError, also for a folder which holds anything that is not of a checkpoint.
    """
    if generation_config is None:
        generation_config = default_generation_config(tokenizer)
    written: Any = network.config
    config, origin = written.to_dict(), getattr(network, "origin", None)
    if origin is None:
        config |= {key: generation_config[key] for key in TOKEN_IDS if key in generation_config}
    else:
        config = _changed(origin.config, type(written).from_dict(origin.config).to_dict(), config)
    files = origin.files if origin is not None and tokenizer is origin.tokenizer else {}
    _write_folder(folder, fit.named_tensors(network), next(network.parameters()).dtype, config,
                  generation_config, tokenizer, files)


def write_tensors(folder: str | Path, found: Survey, tensors: Mapping[str, Stored]) -> None:
    """As `write`, for the checkpoint `found` with these tensors in place of its own: each is read
    when its turn comes. The dtype of most of them stands in config.json."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    _write_folder(folder, tensors, sizes.most_common(1)[0][0], found.config,
                  found.generation_config, found.tokenizer, found.files)


def _changed(origin: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was, with what is otherwise `now` in the config that was made of it."""
    changed = {key: _changed(origin[key], before[key], value) if all(
        isinstance(one.get(key), dict) for one in (origin, before, now)) and key.endswith("_config")
        else value for key, value in now.items() if value != before.get(key)}
    if changed.keys() & {"rope_theta", "rope_scaling"}:  # these two keys say it all
        changed |= {key: now[key] for key in ("rope_theta", "rope_scaling")}
        origin = {key: value for key, value in origin.items()
                  if key not in ("rope_parameters", "original_max_position_embeddings")}
    return origin | changed


def _write_folder(folder: str | Path, tensors: Mapping[str, Tensor | Stored], dtype: torch.dtype,
                  config: Mapping[str, Any], generation_config: Mapping[str, Any],
                  tokenizer: Tokenizer | None, files: Mapping[str, bytes]) -> None:
    """Replace `folder`; the tokenizer's files are `files`, if tokenizer.json is one of them, or
    else those of its maker, if any, and what we make of them."""
    folder = Path(os.path.expanduser(folder)).resolve()
    with disk_errors(folder):
        others = [path.name for path in (folder.iterdir() if folder.exists() else ())
                  if not (path.name == TEMPLATES if path.is_dir()
                          else path.is_file() and CHECKPOINT_FILE.fullmatch(path.name))]
    if others:
        raise VicugnaError(f"the folder holds {min(others)}, which is not part of a checkpoint and "
                           "would be lost", str(folder), "Choose another folder")
    # Weights are written in full, and no code is taken along but our own.
    name = str(dtype).removeprefix("torch.")
    config = _with_dtype({key: value for key, value in config.items() if key not in (
        "quantization_config", "auto_map")}, name) | {"dtype": name, "torch_dtype": name}
    # Architectures that transformers does not know come with a thin file over this package.
    code = Path(__file__).with_name(f"modeling_{config['model_type']}.py")
    if code.exists():
        name = config["model_type"].title()
        config["auto_map"] = {"AutoConfig": f"{code.stem}.{name}Config",
                              "AutoModelForCausalLM": f"{code.stem}.{name}ForCausalLM"}
    sweep_temporaries(folder.parent, folder.name)
    with replacing_folder(folder) as temporary:
        weights.write(temporary, tensors)
        write_json(temporary / "config.json", config)
        if generation_config:
            write_json(temporary / "generation_config.json", dict(generation_config))
        for file, content in files.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_bytes(content)
        if tokenizer and "tokenizer.json" not in files:
            tokenizer.save(temporary)
        if code.exists():
            shutil.copyfile(code, temporary / code.name)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose sections, where they name a dtype, name this one. The first files of Llama 4
    have 4 for true, which later readers refuse: they get true."""
    sections = {key: _with_dtype(value, dtype) for key, value in config.items()
                if key.endswith("_config") and isinstance(value, dict)}
    tuning = {key: bool(value) for key, value in config.items()
              if key == "attn_temperature_tuning" and isinstance(value, int)}
    return config | sections | tuning | {
        key: dtype for key in ("dtype", "torch_dtype") if key in config}

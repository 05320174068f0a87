"""The Hugging Face directory: a checkpoint as transformers, vLLM and llama.cpp know it."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import models
from vicugna.checkpoint import weights
from vicugna.checkpoint.digest import digest, is_tied
from vicugna.checkpoint.weights import broken, short
from vicugna.errors import VicugnaError
from vicugna.files import canonical, disk_errors, read_json, replacing_folder, write_json
from vicugna.tokenizer import Tokenizer

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
CHECKPOINT_FILE = re.compile(r"\.(safetensors|json|jinja)$|^modeling_\w+\.py$")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
JSON_BYTES = 20 * 10**6  # an index of 150,000 tensors
HUB_ERRORS = {
    "GatedRepoError": ("the Hub asks for an approved account", "Ask there, then: hf auth login"),
    "RepositoryNotFoundError": ("no such folder, and no such model on the Hub", "Check the name"),
    "RevisionNotFoundError": ("the Hub has no such revision of it", "Check the revision")}


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
        return digest(self.network.state_dict(), config.to_dict(), self.tokenizer,
                      self.generation_config)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu") -> Checkpoint:
    """Read the checkpoint in folder `path`, or named by Hub id `org/name[@revision]`.

    Parameters become `dtype`; None keeps what is stored. Buffers keep the network's own dtype.
    Weights stay a private mapping of their files where neither dtype nor device changes.
    Nothing is unpickled and no code of the checkpoint is run. Raises VicugnaError.
    """
    with disk_errors(path):
        folder = _locate(path)
        config = _read_object(folder, "config.json")
        if "quantization_config" in config:
            raise VicugnaError("its weights are quantised, which is not read", str(folder),
                               "Use the unquantised checkpoint")
        stored = weights.scan(_weight_files(folder))
        network = _build(config, len(stored), folder)
        _fill(network, stored, dtype, torch.device(device), folder)
        generation_config = (_read_object(folder, "generation_config.json")
                             if (folder / "generation_config.json").exists() else {})
        files = [_inside(folder, name) for name in TOKENIZER_FILES if (folder / name).exists()]
        tokenizer = Tokenizer(folder) if folder / "tokenizer.json" in files else None
        return Checkpoint(config, network, tokenizer, generation_config)


def _locate(path: str | Path) -> Path:
    """The local folder of a checkpoint: `path` itself, or a Hub snapshot of the id it names."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
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


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = _inside(folder, name)
    if path.stat().st_size > JSON_BYTES:
        raise broken(f"over {JSON_BYTES:,} bytes", path)
    value = read_json(path)
    if not isinstance(value, dict):
        raise broken("not a JSON object", path)
    try:
        canonical(value)
    except ValueError as error:  # NaN, infinity, half of a surrogate pair: no JSON has them
        raise broken(f"holds a value outside JSON: {error}", path) from error
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, every one inside its folder."""
    if (folder / weights.SINGLE).exists():
        return [_inside(folder, weights.SINGLE)]
    if not (folder / weights.INDEX).exists():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise _refusal(pickles[0]) if pickles else broken(
            f"neither {weights.SINGLE} nor {weights.INDEX} is there", folder)
    shards = _read_object(folder, weights.INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(
            isinstance(name, str) and name.isprintable() and len(name) < 256
            for name in shards.values()):
        raise broken("weight_map does not give each tensor a file", folder / weights.INDEX)
    names = sorted(set(shards.values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        raise _refusal(folder / others[0])
    return [_inside(folder, name) for name in names]


def _refusal(path: Path) -> VicugnaError:
    return VicugnaError("refused: only safetensors weights are read, since pickled files can run "
                        "code when they are opened", str(path),
                        "Use the safetensors form of this checkpoint")


def _build(config: dict[str, Any], tensors: int, folder: Path) -> nn.Module:
    """The network, without memory for its weights yet."""
    where, layers = str(folder / "config.json"), config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:  # or building them might take forever
        raise broken(f"num_hidden_layers is {layers:,}, but the weights are only {tensors:,} "
                     "tensors", where)
    try:
        module = models.architecture(config.get("model_type"))
        chosen = module.Config.from_dict(config)
        with torch.device("meta"):
            return module.Network(chosen)
    except VicugnaError as error:
        raise VicugnaError(error.what, where, error.fix) from error
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise broken(f"no network can be built from it: {reason}", where) from error


def _fill(network: Any, stored: dict[str, weights.Stored], dtype: torch.dtype | None,
          device: torch.device, folder: Path) -> None:
    """Load the tensors straight into a network that has no memory yet."""
    config, state = network.config.to_dict(), network.state_dict()
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    # A tied lm_head may be stored too, and (before transformers 4.31) RoPE's frequencies.
    wanted = {name: tensor for name, tensor in state.items()
              if name in stored or not is_tied(name, config)}
    stored = {name: tensor for name, tensor in stored.items()
              if not name.endswith("rotary_emb.inv_freq")}
    _compare(wanted, stored, folder)
    kinds = {stored[name].dtype for name in wanted if name in parameters}
    if dtype is None and len(kinds) > 1:
        raise VicugnaError(f"its weights are stored as {' and '.join(sorted(map(str, kinds)))}",
                           str(folder), "Load it as one of them: dtype='float32' or 'bfloat16'")
    dtypes = {name: (dtype or stored[name].dtype) if name in parameters else state[name].dtype
              for name in wanted}
    tensors = weights.read(stored, dtypes, device)
    if config["tie_word_embeddings"]:
        embeddings = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embeddings), embeddings):
            raise VicugnaError("lm_head.weight differs from the embeddings, but config.json ties "
                               "them", str(folder), "Set tie_word_embeddings to false in it")
    network.load_state_dict(tensors, assign=True)
    if config["tie_word_embeddings"]:
        network.lm_head.weight = network.model.embed_tokens.weight
    network.eval()


def _compare(wanted: Mapping[str, Tensor], stored: Mapping[str, weights.Stored],
             folder: Path) -> None:
    """Raise VicugnaError unless names and shapes of the weights are those of the network."""
    shapes = [f"{name} is {list(stored[name].shape)} instead of {list(wanted[name].shape)}"
              for name in sorted(wanted.keys() & stored.keys())
              if stored[name].shape != tuple(wanted[name].shape)]
    faults = [f"{kind} {', '.join(names[:3])}" + f" and {len(names) - 3:,} more" * (len(names) > 3)
              for kind, names in (("missing", sorted(wanted.keys() - stored.keys())),
                                  ("unexpected", sorted(map(short, stored.keys() - wanted.keys()))),
                                  ("wrong shape:", shapes)) if names]
    if faults:
        raise broken(f"the tensors do not fit config.json: {'; '.join(faults)}", folder)


def default_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json of a model that ends its text where its tokenizer says."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id,
                                         "eos_token_id": list(tokenizer.eos_ids),
                                         "pad_token_id": tokenizer.pad_id}


def write(folder: str | Path, network: nn.Module, tokenizer: Tokenizer | None,
          generation_config: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint into `folder`, whole or not at all, replacing a checkpoint there.

    The same model gives the same bytes. `generation_config` None is made from the tokenizer.
    Raises VicugnaError, also for a folder which holds anything that is not of a checkpoint.
    """
    folder = Path(os.path.expanduser(folder)).resolve()
    with disk_errors(folder):
        others = [path.name for path in (folder.iterdir() if folder.exists() else ())
                  if not path.is_file() or not CHECKPOINT_FILE.search(path.name)]
    if others:
        raise VicugnaError(f"the folder holds {min(others)}, which is not part of a checkpoint and "
                           "would be lost", str(folder), "Choose another folder")
    if generation_config is None:
        generation_config = default_generation_config(tokenizer)
    written: Any = network.config
    config = written.to_dict()
    tensors = {name: tensor for name, tensor in network.state_dict().items()
               if not is_tied(name, config)}
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    config |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 reads the first name
    config |= {key: generation_config[key] for key in TOKEN_IDS if key in generation_config}
    # Architectures that transformers does not know come with a thin file over this package.
    code = Path(__file__).with_name(f"modeling_{config['model_type']}.py")
    if code.exists():
        name = config["model_type"].title()
        config["auto_map"] = {"AutoConfig": f"{code.stem}.{name}Config",
                              "AutoModelForCausalLM": f"{code.stem}.{name}ForCausalLM"}
    with replacing_folder(folder) as temporary:
        weights.write(temporary, tensors)
        write_json(temporary / "config.json", config)
        if generation_config:
            write_json(temporary / "generation_config.json", dict(generation_config))
        if tokenizer:
            tokenizer.save(temporary)
        if code.exists():
            shutil.copyfile(code, temporary / code.name)

"""The folder of a checkpoint in Hugging Face's form: read and written."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint import foreign
from vicugna.checkpoint.folder import inside, read_object
from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.stored import Stored, broken, short
from vicugna.checkpoint.survey import Survey
from vicugna.dtypes import name_of
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors, replacing_folder, sweep_temporaries, write_json
from vicugna.tokenizer import FILES as TOKENIZERS
from vicugna.tokenizer import Tokenizer

# Of tokenizers, chat templates and processors of images: kept as they are when a model is saved.
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt",
              "chat_template.jinja", "chat_template.json", "processor_config.json",
              "preprocessor_config.json")
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
# The files that a folder may hold which a checkpoint replaces: those of a checkpoint, no more.
CHECKPOINT_FILE = re.compile("|".join([
    r"model(-\d+-of-\d+)?\.safetensors", r"modeling_\w+\.py",
    *map(re.escape, ("config.json", "generation_config.json", weights.INDEX, *KEPT_FILES))]))
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CLASSIFIER = re.compile(r"\w+For(\w+Classification|QuestionAnswering|RewardModel\w*)")
METHODS = {"gptq": "GPTQ", "awq": "AWQ"}
INDEX_BYTES = 20 * 10**6  # an index of 150,000 tensors
KEPT_BYTES = 50 * 10**6  # of all of them; the largest tokenizer.json has 33


def recognises(folder: Path) -> bool:
    """Whether `folder` holds weights of this form."""
    return any(os.path.lexists(folder / name) for name in (weights.SINGLE, weights.INDEX))


def files_in(folder: Path) -> list[Path]:
    """The files of the checkpoint in `folder`, without whatever else lies there."""
    return [path for path in folder.iterdir() if CHECKPOINT_FILE.fullmatch(path.name)] + [
        *folder.glob(f"{TEMPLATES}/*.jinja")]


def survey(folder: Path) -> Survey:
    """The survey of the folder. Raises VicugnaError; OSError."""
    if any((folder / name).exists() for name in foreign.EMBEDDING):
        raise foreign.explain(folder)
    config = read_object(folder, "config.json")
    if head := CLASSIFIER.search(str(config.get("architectures"))):
        raise VicugnaError(f"a classifier ({head[0]}): it has no language-model head", str(folder),
                           "Name a language model")
    block = _fp8_block(config, folder)
    stored = weights.scaled(weights.unwrapped(_scan(folder)), block)
    generation_config = (read_object(folder, "generation_config.json")
                         if os.path.lexists(folder / "generation_config.json") else {})
    files = _kept_files(folder)
    tokenizer = Tokenizer(folder) if files.keys() & set(TOKENIZERS) else None
    return Survey(folder, config, stored, tokenizer, generation_config, files)


def _kept_files(folder: Path) -> dict[str, bytes]:
    """The contents of those of KEPT_FILES, and further templates, that are there."""
    extra = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{TEMPLATES}/*"))
    found = [inside(folder, name) for name in (*KEPT_FILES, *extra)
             if os.path.lexists(folder / name)]
    if sum(path.stat().st_size for path in found) > KEPT_BYTES:
        longest = max(found, key=lambda path: path.stat().st_size)
        raise broken(f"over {KEPT_BYTES:,} bytes with the rest of the tokenizer", longest)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _fp8_block(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a block-scaled FP8 checkpoint; None if not quantised.
    VicugnaError for other kinds of quantised weights."""
    how = config.get("quantization_config", config.get("quantization"))  # MLX's key
    if how is None:
        return None
    how = how if isinstance(how, dict) else {"quant_method": how}
    kind, block = how.get("quant_method"), how.get("weight_block_size")
    if "quantization" in config and kind is None:
        kind = f"MLX, {how.get('bits')} bits"
    if ((kind, how.get("activation_scheme")) == ("fp8", "dynamic") and isinstance(block, list)
            and len(block) == 2 and all(type(n) is int and 1 <= n <= 4096 for n in block)):
        return block[0], block[1]
    fp8 = (", or one in FP8 whose weight_block_size is two sizes and activation_scheme dynamic"
           if kind == "fp8" else ", or a GGUF file of the model")
    method = short(METHODS.get(str(kind), str(kind)))
    raise VicugnaError(f"its weights are quantised ({method}), which is not read", str(folder),
                       "Use the unquantised checkpoint" + fp8)


def _scan(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers of its safetensors files, each of which is
    inside the folder and holds what the index says."""
    if os.path.lexists(folder / weights.SINGLE):
        return weights.scan([inside(folder, weights.SINGLE)])
    shards = read_object(folder, weights.INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(
            isinstance(name, str) and name.isprintable() and len(name) < 256
            for name in shards.values()):
        raise broken("weight_map does not give each tensor a file", folder / weights.INDEX)
    names = sorted(set(shards.values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        raise VicugnaError(foreign.PICKLE, str(folder / others[0]), foreign.SAFETENSORS)
    found = weights.scan([inside(folder, name) for name in names])
    for name, file in shards.items():
        if name not in found or found[name].file != folder / file:
            raise broken(f"weight_map gives {short(name)} to {file}, which does not hold it",
                         folder / weights.INDEX)
    return found


def updated(original: dict[str, Any], before: dict[str, Any], now: dict[str, Any]
            ) -> dict[str, Any]:
    """config.json as it was, with the values that changed in the config that was parsed from it."""
    changed = {key: updated(original[key], before[key], value) if all(
        isinstance(one.get(key), dict) for one in (original, before, now)
        ) and key.endswith("_config") else value
        for key, value in now.items() if value != before.get(key)}
    if changed.keys() & {"rope_theta", "rope_scaling"}:  # these two keys replace all others
        changed |= {key: now[key] for key in ("rope_theta", "rope_scaling")}
        original = {key: value for key, value in original.items()
                    if key not in ("rope_parameters", "original_max_position_embeddings")}
    return original | changed


def write(folder: str | Path, tensors: Mapping[str, Tensor | Stored], config: Mapping[str, Any],
          generation_config: Mapping[str, Any], tokenizer: Tokenizer | None,
          files: Mapping[str, bytes]) -> None:
    """Write a checkpoint into `folder`, whole or not at all, replacing a checkpoint there.

    The same model gives the same bytes; the dtype of most of them stands in config.json. The
    tokenizer's files are `files`, if tokenizer.json is one of them, or else those that
    Tokenizer.save writes.
    """
    folder = Path(os.path.expanduser(folder)).resolve()
    with disk_errors(folder):
        others = [path.name for path in (folder.iterdir() if folder.exists() else ())
                  if not (path.name == TEMPLATES if path.is_dir()
                          else path.is_file() and CHECKPOINT_FILE.fullmatch(path.name))]
    if others:
        raise VicugnaError(f"the folder holds {min(others)}, which is not part of a checkpoint and "
                           "would be lost", str(folder), "Choose another folder")
    # Weights are written in full, and no code is copied but our own.
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    name = name_of(sizes.most_common(1)[0][0])
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

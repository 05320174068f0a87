"""The digest of a model: one SHA-256 over everything that decides its outputs.

It is taken over what is *loaded*: a bfloat16 checkpoint loaded as float32 has other logits than as
it is stored, and another digest. The layout of files (shards, order) does not enter, nor
do notes in config.json that change nothing (who wrote it, with which version and remote code).
"""

import hashlib
import os
from collections import ChainMap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, cast

from torch import Tensor

from vicugna.chat.image_settings import digest_with_images
from vicugna.checkpoint.state_dict import PackedTensors, Parts, StoredTensors
from vicugna.checkpoint.stored import Blocks, Mapped, raw_bytes
from vicugna.checkpoint.survey import Survey
from vicugna.dtypes import name_of
from vicugna.files import digest_of, disk_errors
from vicugna.progress import Report
from vicugna.tokenizer import Tokenizer

# Tensors' own dtypes are hashed with them; token ids stand in the tokenizer and generation config.
NOTES = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
                   "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"})


def digest(tensors: Mapping[str, Tensor | Blocks], config: Mapping[str, Any],
           tokenizer: Tokenizer | None, generation_config: Mapping[str, Any],
           weights: str | None = None, report: Report = lambda done, name: None) -> str:
    """SHA-256 (hex) of a model.

    `tensors` are `named_tensors(network)`, `config` is the network's config.to_dict(), `weights`
    is the format into which matrices were quantised when they were loaded. Tensors are
    hashed in place, a thread a core, then their hashes in the order of their names; `report` is
    called with each one's number and name.
    """
    numbers = count(1)

    def entry(name: str) -> list[Any]:
        tensor = tensors[name]
        report(next(numbers), name)
        kind, data = ((tensor.kind, tensor.rows) if isinstance(tensor, Blocks)
                      else (name_of(tensor.dtype), tensor))
        return [name, kind, list(tensor.shape), hashlib.sha256(raw_bytes(data)).hexdigest()]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        entries = list(threads.map(entry, sorted(tensors)))
    return digest_of({
        "tensors": entries,
        "config": {key: value for key, value in config.items() if key not in NOTES},
        "tokenizer": digest_with_images(tokenizer) if tokenizer else None,
        "generation_config": {key: value for key, value in generation_config.items()
                              if key not in ("transformers_version", "_from_model_config")},
        "quantisation": weights,
    })


def digest_stored(parts: Parts, found: Survey, packed: set[str], report: Report) -> str | None:
    """The digest that a model loaded in the dtypes it is stored in has; None where its parameters
    have several, in which it cannot be loaded.

    `parts` are those of the survey, `packed` the names of parameters whose blocks are kept,
    `report` is called with each tensor's number and name. VicugnaError for values that are not
    finite.
    """
    if len(parts.kinds_of(parts.made_of.keys() - packed)) > 1:
        return None
    tensors = ChainMap[str, Any](
        cast(Any, PackedTensors(parts, packed, Mapped(), as_blocks=True)),
        cast(Any, StoredTensors(parts, None)))
    with disk_errors(found.folder):
        return digest(tensors, parts.network.config.to_dict(), found.tokenizer,
                      found.generation_config, report=report)

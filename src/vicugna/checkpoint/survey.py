"""The description of a checkpoint: what is known before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicugna.checkpoint.stored import Stored
from vicugna.tokenizer import Tokenizer


@dataclass(frozen=True)
class Survey:
    """A checkpoint without the values of its weights.

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
        """The file that `config` was read from: config.json, params.json, or the GGUF file."""
        paths = (self.folder / name for name in ("config.json", "params.json"))
        return next((path for path in paths if path.exists()), self.folder)


def default_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json with the special tokens of the tokenizer."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id,
                                         "eos_token_id": list(tokenizer.eos_ids),
                                         "pad_token_id": tokenizer.pad_id}

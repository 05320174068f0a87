"""What a checkpoint says of itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicugna.checkpoint.stored import Stored
from vicugna.tokenizer import Tokenizer


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


def default_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json of a model that ends its text where its tokenizer says."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id,
                                         "eos_token_id": list(tokenizer.eos_ids),
                                         "pad_token_id": tokenizer.pad_id}

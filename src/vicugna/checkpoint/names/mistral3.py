"""Mistral Small 3.1 and 3.2, and Ministral 3: a text model with a vision encoder."""

from collections.abc import Collection, Mapping
from typing import Any

from vicugna.checkpoint.names.names import Names

IMAGES = ("vision_tower.", "multi_modal_projector.")  # passed through: text is computed here


def _untied(config: Mapping[str, Any], stored: Collection[str]) -> Mapping[str, Any]:
    """transformers 5 writes `tie_word_embeddings` true, and ties only where no head is stored."""
    own = "language_model.lm_head.weight" in stored
    return {**config, "tie_word_embeddings": False} if own else config


NAMES = Names(passthrough=lambda name, config: name.startswith(IMAGES), normalise=_untied)

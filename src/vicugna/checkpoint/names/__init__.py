"""Names in checkpoints, one file per architecture."""

from typing import Any

from vicugna.checkpoint.names import deepseek_v3, llama, llama4, mistral3, mixtral
from vicugna.checkpoint.names.names import Names, Parameter, general

ARCHITECTURES = dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2"), llama.NAMES
                              ) | dict.fromkeys(("llama4", "llama4_text"), llama4.NAMES) | {
    "deepseek_v3": deepseek_v3.NAMES, "mistral3": mistral3.NAMES, "mixtral": mixtral.NAMES}

__all__ = ["ARCHITECTURES", "Names", "Parameter", "general", "of"]


def of(model_type: Any) -> Names:
    """The names of an architecture; the network's own in all files if it is not listed."""
    return ARCHITECTURES.get(model_type, Names())

"""Checkpoints on disk: the Hugging Face directory, its safetensors files, and the digest."""

from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.directory import (
    Checkpoint,
    Survey,
    default_generation_config,
    read,
    survey,
    write,
)
from vicugna.checkpoint.fit import named_tensors

__all__ = ["Checkpoint", "Survey", "default_generation_config", "digest", "named_tensors", "read",
           "survey", "write"]

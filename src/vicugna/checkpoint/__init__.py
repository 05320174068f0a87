"""Checkpoints on disk: the Hugging Face directory, its safetensors files, and the digest."""

from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.directory import Checkpoint, default_generation_config, read, write

__all__ = ["Checkpoint", "default_generation_config", "digest", "read", "write"]

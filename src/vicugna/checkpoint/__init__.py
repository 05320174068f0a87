"""Checkpoints on disk: three forms (hf, gguf, meta), read, written, converted; and the digest."""

from vicugna.checkpoint.checkpoint import Checkpoint, Origin
from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.load import read, survey
from vicugna.checkpoint.source import download
from vicugna.checkpoint.state_dict import named_tensors
from vicugna.checkpoint.survey import Survey, default_generation_config

__all__ = ["Checkpoint", "Origin", "Survey", "default_generation_config", "digest", "download",
           "named_tensors", "read", "survey"]

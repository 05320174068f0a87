"""Inference: generation over a key/value cache, with the very networks that training uses."""

from vicugna.engine.cache import Cache
from vicugna.engine.generate import Completion, Delta, generate, stream
from vicugna.engine.sampling import Sampling

__all__ = ["Cache", "Completion", "Delta", "Sampling", "generate", "stream"]

"""Inference: requests in, tokens out, with the very networks that training uses."""

from vicugna.engine import weights
from vicugna.engine.engine import Engine
from vicugna.engine.generate import Completion, generate, stream
from vicugna.engine.sampling import Sampling
from vicugna.engine.sequence import Output, Request
from vicugna.engine.text import Delta, TextStream

__all__ = ["Completion", "Delta", "Engine", "Output", "Request", "Sampling", "TextStream",
           "generate", "stream", "weights"]

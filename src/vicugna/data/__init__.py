"""Training data: sources, packing, mixing, exact resume."""

from vicugna.data.mixing import Stream, open_stream, texts
from vicugna.data.packing import IGNORED, Batch, Row
from vicugna.data.sources import SourceSpec, parse_specs

__all__ = ["IGNORED", "Batch", "Row", "SourceSpec", "Stream", "open_stream", "parse_specs",
           "texts"]

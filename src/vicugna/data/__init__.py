"""Training data: sources, packing, mixing, exact resume."""

from vicugna.data.mixing import Stream, open_stream, texts
from vicugna.data.packing import Batch, Row
from vicugna.data.procedural import draw_item
from vicugna.data.sources import SourceSpec, parse_specs

__all__ = ["Batch", "Row", "SourceSpec", "Stream", "draw_item", "open_stream", "parse_specs",
           "texts"]

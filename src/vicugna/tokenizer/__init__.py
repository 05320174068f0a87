"""Tokenizers: our own byte-level BPE, and those of other families' files."""

from vicugna.tokenizer.bpe import MINIMUM_VOCABULARY, train
from vicugna.tokenizer.tokenizer import (
    END_THINK,
    FILES,
    THINK,
    StreamDecoder,
    Tokenizer,
    from_model_file,
    valid_unicode,
)

__all__ = ["END_THINK", "FILES", "MINIMUM_VOCABULARY", "THINK", "StreamDecoder", "Tokenizer",
           "from_model_file", "train", "valid_unicode"]

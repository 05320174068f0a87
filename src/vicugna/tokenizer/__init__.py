"""Tokenizers and chat templates: our own byte-level BPE, and those of other families' files."""

from vicugna.tokenizer.bpe import (
    FILES,
    MINIMUM_VOCABULARY,
    StreamDecoder,
    Tokenizer,
    from_model_file,
    train,
    valid_unicode,
)
from vicugna.tokenizer.chat import check_messages

__all__ = ["FILES", "MINIMUM_VOCABULARY", "StreamDecoder", "Tokenizer", "check_messages",
           "from_model_file", "train", "valid_unicode"]

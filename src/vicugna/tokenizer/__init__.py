"""Tokenizers and chat templates: our own byte-level BPE, and those of other families' files."""

from vicugna.chat.template import check_messages
from vicugna.tokenizer.bpe import (
    FILES,
    MINIMUM_VOCABULARY,
    StreamDecoder,
    Tokenizer,
    from_model_file,
    train,
    valid_unicode,
)

__all__ = ["FILES", "MINIMUM_VOCABULARY", "StreamDecoder", "Tokenizer", "check_messages",
           "from_model_file", "train", "valid_unicode"]

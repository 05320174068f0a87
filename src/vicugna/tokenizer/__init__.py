"""Byte-level BPE tokenizers and chat templates."""

from vicugna.tokenizer.bpe import MINIMUM_VOCABULARY, StreamDecoder, Tokenizer, train, valid_unicode
from vicugna.tokenizer.chat import check_messages

__all__ = ["MINIMUM_VOCABULARY", "StreamDecoder", "Tokenizer", "check_messages", "train",
           "valid_unicode"]

"""Byte-level BPE tokenizers and chat templates."""

from vicugna.tokenizer.bpe import MINIMUM_VOCABULARY, StreamDecoder, Tokenizer, train
from vicugna.tokenizer.chat import TEMPLATE, check_messages

__all__ = ["MINIMUM_VOCABULARY", "TEMPLATE", "StreamDecoder", "Tokenizer", "check_messages",
           "train"]

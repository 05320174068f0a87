"""What byte-level BPE tokenizers share: the table of bytes, how text is split, how one is built."""

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

# GPT-2's table: each byte as a printable character, here from character to byte.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = ({chr(byte): byte for byte in _PRINTABLE} |
         {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - _PRINTABLE))})
CHARACTERS = {byte: character for character, byte in BYTES.items()}

# How published tokenizers split text into words.
_SUFFIXES, _BEFORE_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS, _SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA_3_SPLIT = (rf"{_SUFFIXES}|{_BEFORE_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}")
QWEN_2_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
_CASED = rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+", rf"{_BEFORE_WORD}{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LLAMA_4_SPLIT = "|".join([f"{_CASED[0]}{_SUFFIXES}?", f"{_CASED[1]}{_SUFFIXES}?", r"\p{N}{1,3}",
                          _PATHS, _SPACES])
TEKKEN_SPLIT = "|".join([*_CASED, r"\p{N}", _PATHS, _SPACES])
GPT_2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build(model: models.Model, split: str, add_prefix_space: bool = False
          ) -> tokenizers.Tokenizer:
    """A byte-level tokenizer around `model`; the expression `split` cuts text into words."""
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    return raw


def prepend_bos(raw: tokenizers.Tokenizer, bos: str) -> None:
    """Put the beginning-of-text token `bos` before every text."""
    raw.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, raw.token_to_id(bos))])

"""Training of byte-level BPE tokenizers."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers, trainers

from vicugna.errors import VicugnaError
from vicugna.tokenizer import byte_level
from vicugna.tokenizer.tokenizer import END_OF_TURN, END_THINK, THINK, Tokenizer, valid_unicode

BOS, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = (BOS, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN, "<|pad|>")
# Tokens that a reader may see, as in other open models: decoding does not skip them.
VISIBLE = (THINK, END_THINK, "<|tool_call|>", "<|/tool_call|>")
ROLES = ("system", "user", "assistant", "tool")
MINIMUM_VOCABULARY = 256 + len(SPECIAL) + len(VISIBLE)
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of exactly `vocab_size` tokens from `texts`; same texts, same tokenizer.

    Raises VicugnaError for too small a vocabulary, and for texts that are too few to fill it.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise VicugnaError(f"{vocab_size} is too few tokens", "vocab_size",
                           f"Use at least {MINIMUM_VOCABULARY} (256 bytes and special tokens)")
    valid = map(valid_unicode, filter(None, texts))
    first = next(valid, None)
    if first is None:
        raise VicugnaError("there is no text to learn from", "tokenizer", "Give some text")
    # The split of Qwen2: Llama 3's, but with digits one by one.
    raw = byte_level.build(models.BPE(), byte_level.QWEN_2_SPLIT)
    specials = [AddedToken(name, special=name in SPECIAL, normalized=False)
                for name in (*SPECIAL, *VISIBLE)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials), min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # Every turn of every chat holds a role's name: make each of them one token.
    roles = ("\n".join([role] * 1000) for role in ROLES)
    raw.train_from_iterator(chain([first], valid, roles), trainer)
    learned = raw.get_vocab_size() + len(specials)
    if learned < vocab_size:
        raise VicugnaError(f"the texts are too few to learn {vocab_size} tokens; they give "
                           f"{learned}", "tokenizer", f"Add text, or set vocab_size to {learned}")
    raw.add_tokens(specials)
    byte_level.prepend_bos(raw, BOS)
    config = {"bos_token": BOS, "eos_token": END_OF_TEXT, "pad_token": "<|pad|>",
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return Tokenizer.of(raw.to_str(pretty=True), config, TEMPLATE)

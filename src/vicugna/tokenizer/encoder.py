"""Encoding in which no user-provided text can become a special token."""

import json
import re
import secrets
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, models

from vicugna.errors import VicugnaError


class Encoder:
    """A checkpoint's tokenizer, but its special tokens are recognised only under placeholders:
    random names, new in every process, which no text can spell. The special tokens' own names are
    plain text to it."""

    def __init__(self, raw: tokenizers.Tokenizer, special: Mapping[str, int], unknown: int | None,
                 vocab_size: int) -> None:
        """`special` are the special tokens' ids by name; `unknown` is the id for what is not in the
        vocabulary, the one special token that text may become."""
        added = dict(sorted(raw.get_added_tokens_decoder().items()))
        self._forbidden = frozenset(special.values()) - {unknown}
        secret = secrets.token_hex(8)
        self._placeholders = {name: f"<{secret}:{id}>" for name, id in special.items()}
        single_words = {token.content for token in added.values() if token.single_word}
        longest_first = sorted(special, key=len, reverse=True)
        self.pattern = re.compile("|".join(
            rf"(?<!\w){re.escape(name)}(?!\w)" if name in single_words else re.escape(name)
            for name in longest_first) or "(?!)")  # finds special tokens' names
        self._raw = tokenizers.Tokenizer(_without_merges_into(raw, special, self._forbidden))
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(raw, part) is not None:
                setattr(self._raw, part, getattr(raw, part))
        # So many more that no placeholder's id is one of the vocabulary, whatever its holes.
        self._raw.add_tokens([f"<{secret}/{id}>" for id in range(
            vocab_size - raw.get_vocab_size(with_added_tokens=False))])
        self._raw.add_tokens([
            AddedToken(self._placeholders[token.content], lstrip=token.lstrip, rstrip=token.rstrip,
                       normalized=False) if token.content in special else token
            for token in added.values()])
        known = self._raw.get_vocab(with_added_tokens=True)
        self._ids = {known[self._placeholders.get(token.content, token.content)]: id
                     for id, token in added.items()}

    def with_placeholders(self, text: str) -> str:
        """A trusted text with a placeholder for each special token's name in it."""
        return self.pattern.sub(lambda name: self._placeholders[name.group()], text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts, on all cores."""
        encodings = self._raw.encode_batch_fast(texts, add_special_tokens=False)
        return [self._checkpoint_ids(encoding.ids) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a text, and where in it each of them begins."""
        encoding = self._raw.encode(text, add_special_tokens=False)
        return self._checkpoint_ids(encoding.ids), [start for start, _ in encoding.offsets]

    def _checkpoint_ids(self, ids: list[int]) -> list[int]:
        if not self._forbidden.isdisjoint(ids):  # which only placeholders stand for
            raise VicugnaError("this tokenizer's own merges spell a special token", "text",
                               "Leave the special token's name out of the text")
        return [self._ids.get(id, id) for id in ids]


def _without_merges_into(raw: tokenizers.Tokenizer, special: Mapping[str, int],
                         forbidden: frozenset[int]) -> models.Model:
    """The model, in which no merge makes a special token; it is copied only where one did."""
    cut = raw.pre_tokenizer.pre_tokenize_str if raw.pre_tokenizer else lambda text: [(text, 0)]
    merged = {name for name, id in special.items() if id in forbidden
              for word, _ in [(name, None), *cut(name)]
              for token in raw.model.tokenize(word) if token.id == id}
    if not merged:
        return raw.model
    content = json.loads(raw.to_str())
    model = content["model"]
    model["merges"] = [pair for pair in model["merges"]
                       if merged.isdisjoint([*pair, "".join(pair)])]
    model["vocab"] = {f"\0{name}" if name in merged else name: id
                      for name, id in model["vocab"].items()}
    bare = {**content, "added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(bare)).model

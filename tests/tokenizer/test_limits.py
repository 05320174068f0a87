"""Tokenizers that would make far more of a text than it holds, or that fail over it."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import llama2, llama3

from vicugna.chat import encode, encode_training
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer


def replacing(sought: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: sought}, "content": content}


def changed(folder: Path, key: str, value: Any) -> Path:
    """A tokenizer of Llama 3 with another part."""
    path = llama3(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return folder


BOS = "<|begin_of_text|>"
TWICE = replacing("a", "aa")
BOMBS = {
    "long": ("normalizer", replacing("a", "a" * 101)),
    "often": ("normalizer", {"type": "Sequence", "normalizers": [TWICE] * 7}),
    "deep": ("normalizer", {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [TWICE] * 4}] * 2}),
    "everywhere": ("normalizer", replacing("", "a" * 100)),
    "regex": ("normalizer", replacing("a*", "a" * 100, "Regex")),
    "before": ("normalizer", {"type": "Prepend", "prepend": "a" * 1001}),
    "back": ("decoder", {"type": "Sequence", "decoders": [replacing("", "a" * 100)]}),
    "around": ("post_processor", {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}] * 1000, "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}}}),
    "added": ("added_tokens", [
        {"id": 1000 + n, "content": f"<{n}>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": False} for n in range(20_001)]),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(bomb: str, tmp_path: Path) -> None:
    with pytest.raises(VicugnaError, match=r"not a tokenizer: .*(more than|too long)"):
        Tokenizer(changed(tmp_path, *BOMBS[bomb]))


def test_many_tokens_of_another_file_are_refused(tmp_path: Path) -> None:
    (llama2(tmp_path) / "added_tokens.json").write_text(json.dumps(
        {f"<{n}>": 1000 + n for n in range(20_001)}))
    with pytest.raises(VicugnaError, match="not a tokenizer: more than 20,000 added tokens"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["normalizer", "pre_tokenizer"])
def test_a_pattern_that_gives_up_is_an_error(key: str, tmp_path: Path) -> None:
    """Its number of tries doubles with each character, and the library panics at some."""
    endless = replacing("(x+x+)+y", "", "Regex") if key == "normalizer" else {
        "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tok = Tokenizer(changed(tmp_path, key, endless))
    assert tok.encode("fine")
    for fails in (tok.encode, lambda text: encode(tok, [{"role": "user", "content": text}]),
                   lambda text: encode_training(tok, [{"role": "user", "content": text}])):
        with pytest.raises(VicugnaError, match="the tokenizer fails on this text"):
            fails("x" * 99)

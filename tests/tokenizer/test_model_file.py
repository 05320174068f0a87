from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from families import TEXTS, byte_level
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vicugna.chat import encode
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer, from_model_file
from vicugna.tokenizer.byte_level import BYTES, LLAMA_3_SPLIT, LLAMA_4_SPLIT

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")
any_text = st.text(st.characters(codec="utf-8", exclude_characters="▁\0"), max_size=40) | st.text(
    alphabet=" \n<s/>ab'1230é漢😀", max_size=40)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Llama 2's: BPE, byte fallback, spaces kept, digits one by one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).split("\n")), model_writer=model, vocab_size=380,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        control_symbols=["[INST]", "ox"], user_defined_symbols=["<fim>"], minloglevel=2)
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@given(text=any_text)
@example("the fox  [INST] </s> ox")
@settings(deadline=None, max_examples=150)
def test_sentencepiece_tokens_are_its_own(spm: Path, text: str) -> None:
    ours = tokenizer_of(spm)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids) == text


_known: dict[Path, Tokenizer] = {}


def tokenizer_of(path: Path) -> Tokenizer:
    return _known.setdefault(path, from_model_file(path))


def test_sentencepiece_is_converted_as_transformers_does(spm: Path, tmp_path: Path) -> None:
    slow = transformers.LlamaTokenizer.from_pretrained(spm.parent)
    wanted = json.loads(slow.backend_tokenizer.to_str())
    ours = from_model_file(spm)
    got = json.loads(ours.json)
    special = {"<unk>", "<s>", "</s>", "[INST]", "ox"}
    assert got["model"] | {"merges": None} == wanted["model"] | {
        "merges": None, "unk_token": "<unk>"}
    assert got["model"]["merges"] == [pair for pair in wanted["model"]["merges"]
                                      if special.isdisjoint([*pair, "".join(pair)])]
    assert got["decoder"] == wanted["decoder"]
    assert got["normalizer"]["normalizers"] == [  # as tokenizer.json of Llama 2 has it
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    assert (ours.bos_id, ours.eos_ids) == (1, (2,)) and ours.id_of("[INST]") == 3
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert ours.prompt("a") == [1, *theirs.encode("a")]
    ours.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a fox", " two  spaces ", "<s>x</s> y[INST]z<fim> 12", ""):
        assert loaded.encode(text) == ours._raw.encode(text).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")


def test_the_newer_treatment_of_spaces(spm: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"legacy": False, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
         "chat_template": "{{ bos_token }}[INST]{{ messages[0].content }}{{ eos_token }}x"}))
    ours = Tokenizer(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in ("a fox", " two  spaces ", "12\n", "x</s>y", "<s>a", ""):
        assert ours._raw.encode(text, add_special_tokens=False).ids == theirs.encode(
            text, add_special_tokens=False)
    chat = [{"role": "user", "content": "the lazy dog"}]
    assert encode(ours, chat) == theirs.apply_chat_template(chat, return_dict=False)
    ours.save(tmp_path / "saved")
    assert encode(Tokenizer(tmp_path / "saved"), chat) == encode(ours, chat)
    assert Tokenizer(tmp_path / "saved").config["add_bos_token"] is True


def rank_lines(raw: Any) -> bytes:
    """tiktoken's file of a byte-level tokenizer: its tokens in the order in which it learnt."""
    model = json.loads(raw.to_str())["model"]
    tokens = sorted(model["vocab"].items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(bytes(map(BYTES.__getitem__, token))) + b" %d\n" % rank
                    for rank, (token, _) in enumerate(tokens))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_bytes(rank_lines(byte_level([LLAMA_3_SPLIT], [])))
    return path


@pytest.mark.parametrize("version, split", [("3", LLAMA_3_SPLIT), ("4", LLAMA_4_SPLIT)])
def test_ranks_are_converted_as_transformers_does(ranks: Path, version: str, split: str) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pytest.importorskip("tiktoken")
    wanted = json.loads(TikTokenConverter(str(ranks), pattern=split).converted().to_str())
    got = json.loads(from_model_file(ranks, version).json)
    for key in ("normalizer", "pre_tokenizer", "decoder", "model"):
        assert got[key] == wanted[key]


@given(text=any_text)
@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("version, split", [("3.1", LLAMA_3_SPLIT), ("4", LLAMA_4_SPLIT)])
def test_ranks_give_the_tokens_of_tiktoken(ranks: Path, version: str, split: str,
                                           text: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    lines = map(bytes.split, ranks.read_bytes().splitlines())
    known = {base64.b64decode(token): int(rank) for token, rank in lines}
    theirs = tiktoken.Encoding("t", pat_str=split, mergeable_ranks=known, special_tokens={})
    key = ranks / version  # of the memory only
    ours = _known.setdefault(key, from_model_file(ranks, version)) if key not in _known else (
        _known[key])
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.decode(ours.encode(text)) == text


def test_control_tokens_of_the_llamas(ranks: Path, tmp_path: Path) -> None:
    base = len(ranks.read_bytes().splitlines())

    def at(version: str, *ids: int) -> list[str]:
        tok = from_model_file(ranks, version)
        return [tok.decode([base + id], skip_special=False) for id in ids]

    assert at("3", 0, 1, 4, 5, 6, 7, 8, 9, 10, 255) == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
        "<|reserved_special_token_250|>"]
    assert at("3.1", 3, 4, 5, 8, 9, 10, 11, 255) == [
        "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>",
        "<|reserved_special_token_247|>"]
    assert at("4", 0, 2, 5, 8, 15, 16, 18, 19, 79, 80, 84, 90, 92, 93, 1133, 1142, 1144, 2047) == [
        "<|begin_of_text|>", "<|fim_prefix|>", "<|header_start|>", "<|eot|>",
        "<|text_post_train_reserved_special_token_5|>", "<|python_start|>",
        "<|finetune_right_pad|>", "<|text_post_train_reserved_special_token_8|>",
        "<|text_post_train_reserved_special_token_68|>", "<|image_start|>",
        "<|tile_x_separator|>", "<|image|>", "<|patch|>", "<|vision_reserved_special_token_7|>",
        "<|vision_reserved_special_token_1047|>", "<|reasoning_thinking_start|>",
        "<|reserved_special_token_0|>", "<|reserved_special_token_903|>"]
    for version, size, pad, stops in (("3", 256, 1, 2), ("3.1", 256, 4, 3), ("4", 2048, 18, 3)):
        tok = from_model_file(ranks, version)
        assert tok.vocab_size == base + size and tok.pad_id == base + pad
        assert tok.eos_ids[0] == base + 1 and len(tok.eos_ids) == stops
        assert tok.prompt("a") == [base, *tok.encode("a")]
    tok.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a <|eot|>")["input_ids"] == tok._raw.encode("a <|eot|>").ids
    with pytest.raises(VicugnaError, match="no version '5'"):
        from_model_file(ranks, "5")


def broken(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(VicugnaError, match=r"not a tokenizer|not valid JSON|not UTF-8") as caught:
        from_model_file(path)
    assert caught.value.where == str(path)


def test_broken_files_are_refused(spm: Path, ranks: Path, tmp_path: Path) -> None:
    path, draw = tmp_path / "tokenizer.model", random.Random(0)
    good = spm.read_bytes()
    for end in [0, 1, 2, 3, 10, *draw.sample(range(11, 3000), 20)]:
        broken(path, good[:end])
    for data in (b"\n", b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\n" + b"\x80" * 100,
                 b"\x0b", b"\n\x02\n\x00" * 10, b"\n\x00" * 1_000_000, b"\n\x05\n\x03a\xffb",
                 b"\n\x08\n\x06" + b"x" * 6 + b"\x12\x02\x18\x01"):
        broken(path, data)
    long = b"".join([b"\n", varint(3 + 300), b"\n", varint(300), b"x" * 300])
    broken(path, long + good)
    lines = ranks.read_bytes()
    for data in (b"IQ==", b"IQ== x\n" + lines, lines[:-1] + b"9\n", lines[5:],
                 b"IQ== 99999999\n" + lines, b"!!! 0\n", b"YWI= 0\n", b"\0" * 100):
        broken(path, data)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    broken_size = pytest.raises(VicugnaError, match="bytes are too many")
    with broken_size:
        from_model_file(path)
    with pytest.raises(VicugnaError, match="no such file"):
        from_model_file(tmp_path / "none.model")


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128, number >> 7]) if number > 127 else bytes([number])


@given(noise=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4))
@settings(deadline=None, max_examples=60)
def test_damaged_files_are_read_or_refused(spm: Path, noise: list[tuple[int, int]]) -> None:
    data = bytearray(spm.read_bytes())
    for at, byte in noise:
        data[at % len(data)] = byte
    path = spm.with_name("damaged.model")
    path.write_bytes(data)
    try:
        from_model_file(path).encode("the fox 漢")
    except VicugnaError as error:
        assert "not a tokenizer" in error.what

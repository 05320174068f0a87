"""Mistral's tekken.json, and Qwen2's vocab.json with merges.txt."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import QWEN_SPLIT, TEXTS, byte_level, template
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import vicugna
from vicugna import models
from vicugna.chat import encode
from vicugna.checkpoint.convert import convert
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer, from_model_file
from vicugna.tokenizer.byte_level import BYTES

transformers = pytest.importorskip("transformers")
TEKKEN_SPLIT = (  # as published
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LISTED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[THINK]", "[/THINK]"]
UNLISTED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
            "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
            "[TOOL_CONTENT]", "<SPECIAL_20>", "<SPECIAL_21>", "<SPECIAL_22>"]
any_text = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(
    alphabet=" \n\r\t/ab'LlM1230é\u0301\u00a0\u2028漢😀", max_size=40)
Content = dict[str, Any]


def tekken(special: list[str] | None, first: int, version: str) -> Content:
    """A tekken.json whose vocabulary is longer than it lets be used, as the published ones are."""
    model = json.loads(byte_level([TEKKEN_SPLIT], []).to_str())["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    # The published ones begin with the bytes in order.
    tokens = [bytes([byte]) for byte in range(256)] + [
        bytes(map(BYTES.__getitem__, token)) for token in ordered if len(token) > 1]
    content: Content = {
        "config": {"pattern": TEKKEN_SPLIT, "num_vocab_tokens": len(tokens), "version": version,
                   "default_vocab_size": first + len(tokens) - 10,
                   "default_num_special_tokens": first},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                  for rank, token in enumerate(tokens)]}
    if special is not None:
        content["special_tokens"] = [{"rank": rank, "token_str": name, "is_control": True}
                                     for rank, name in enumerate(special)]
    return content


FORMS = {"listed": tekken(LISTED, 12, "v13"), "unlisted": tekken(None, 23, "v3")}
_known: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps(FORMS[request.param]))
    _known[request.param] = from_model_file(path)
    return request.param


@given(text=any_text)
@example("  Two  WORDS, L'été 12345\r\n\r\n/x 漢字 \u00a0 😀")
@settings(deadline=None, max_examples=150)
def test_tekken_gives_the_tokens_of_tiktoken(form: str, text: str) -> None:
    """mistral_common's Tekkenizer is tiktoken, its ids moved up by the special tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    ours, content = _known[form], FORMS[form]
    first = content["config"]["default_num_special_tokens"]
    used = content["config"]["default_vocab_size"] - first
    theirs = tiktoken.Encoding("t", pat_str=TEKKEN_SPLIT, special_tokens={}, mergeable_ranks={
        base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:used]})
    ids = ours.encode(text)
    assert ids == [first + id for id in theirs.encode(text, disallowed_special=())]
    assert ours.decode(ids) == text


def test_special_tokens_of_tekken_come_first(form: str) -> None:
    ours, first = _known[form], FORMS[form]["config"]["default_num_special_tokens"]
    names = UNLISTED if form == "unlisted" else [*LISTED, *(f"<SPECIAL_{id}>" for id in
                                                          range(8, 12))]
    assert [ours.decode([id], False) for id in range(first)] == names
    assert ours.vocab_size == FORMS[form]["config"]["default_vocab_size"]
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (1, (2,), names.index("<pad>"))
    assert ours.prompt("a") == [1, *ours.encode("a")] == [1, first + ord("a")]
    assert ours.special_ids == set(range(first))


def test_tekken_is_converted_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    (tmp_path / "tekken.json").write_text(json.dumps(FORMS["listed"]))
    wanted = json.loads(MistralConverter(str(tmp_path / "tekken.json")).converted().to_str())
    ours = Tokenizer(tmp_path)
    got = json.loads(ours.json)
    for key in ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens"):
        assert got[key] == wanted[key], key
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == ours.vocab_size
    for text in ("", " Été 123\n\n", "a [INST]b</s>"):  # with the beginning of text, as published
        assert theirs(text)["input_ids"] == [1, *theirs.encode(text, add_special_tokens=False)]
        assert theirs(text)["input_ids"] == ours._raw.encode(text).ids
    assert theirs.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>",
                                         "unk_token": "<unk>", "pad_token": "<pad>"}
    assert Tokenizer(tmp_path / "saved").digest == ours.digest


def test_what_stands_beside_tekken_counts(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(FORMS["unlisted"]))
    (tmp_path / "chat_template.jinja").write_text(template("mistral"))
    ours = Tokenizer(tmp_path)
    ids = encode(ours, [{"role": "user", "content": "a [INST]"}])
    assert [id for id in ids if id in ours.special_ids] == [1, 3, 4]
    byte_level([r"\s+"], ["<x>"]).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).id_of("<x>") is not None  # tokenizer.json wins


def edited(**changes: Any) -> Content:
    return {**FORMS["listed"], "config": {**FORMS["listed"]["config"], **changes}}


def without(key: str) -> Content:
    return {name: value for name, value in FORMS["listed"].items() if name != key}


def entries(at: int, **changes: Any) -> Content:
    """With one entry of the vocabulary changed."""
    listed = list(FORMS["listed"]["vocab"])
    listed[at] = {**listed[at], **changes}
    return {**FORMS["listed"], "vocab": listed}


TOKENS = FORMS["listed"]["vocab"]
SPECIAL = FORMS["listed"]["special_tokens"]
BAD = {
    "base64": entries(300, token_bytes="!!!"), "half of base64": entries(300, token_bytes="YWI"),
    "no text": entries(300, token_bytes=3), "a token twice": entries(300, token_bytes="YQ=="),
    "a rank twice": entries(300, rank=299), "a rank left out": entries(300, rank=10**6),
    "a rank below zero": entries(0, rank=-1), "no number": entries(0, rank="0"),
    "not every byte": entries(65, token_bytes=base64.b64encode(b"zqzqz").decode()),
    "a long token": entries(300, token_bytes=base64.b64encode(b"x" * 300).decode()),
    "a control token as text": entries(300, token_bytes=base64.b64encode(b"<s>").decode()),
    "nothing": {}, "no config": without("config"), "no vocabulary": without("vocab"),
    "no list after v7": without("special_tokens"), "not a list": {**FORMS["listed"], "vocab": 3},
    **{f"no {key}": {**FORMS["listed"], "config": {
        name: value for name, value in FORMS["listed"]["config"].items() if name != key}}
       for key in ("pattern", "default_vocab_size", "default_num_special_tokens")},
    "a broken pattern": edited(pattern="(("), "more tokens": edited(default_vocab_size=10**9),
    "fewer than special": edited(default_vocab_size=5),
    "too many special": edited(default_num_special_tokens=10**12, default_vocab_size=10**12),
    "special beyond their number": edited(default_num_special_tokens=7),
    "special twice": {**FORMS["listed"], "special_tokens": [*SPECIAL[:7], {
        **SPECIAL[7], "token_str": "<s>"}]},
    "special rank twice": {**FORMS["listed"], "special_tokens": [*SPECIAL[:7], SPECIAL[6]]},
    "special without a name": {**FORMS["listed"], "special_tokens": [{"rank": 0}]},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_broken_tekken_is_refused(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(content))
    for read in (from_model_file, lambda path: Tokenizer(path.parent)):
        with pytest.raises(VicugnaError, match="not a tokenizer") as caught:
            read(path)
        assert caught.value.where == str(path) and "\n" not in str(caught.value)


def test_tekken_that_is_cut_off_deep_or_huge_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "tekken.json", json.dumps(FORMS["listed"])
    for text in ("", "{", whole[:-1], whole[:5000], '{"a":' * 10**5, "[1]", "null", "\x00" * 50):
        path.write_text(text)
        with pytest.raises(VicugnaError, match="not a tokenizer"):
            Tokenizer(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VicugnaError, match="bytes are too many"):
        Tokenizer(tmp_path)


# vocab.json and merges.txt.

QWEN = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool_call>": False}
CLASS = {"tokenizer_class": "Qwen2Tokenizer"}


def pair(folder: Path, config: Content | None = None, **more: Content) -> Path:
    """A folder with vocab.json, merges.txt, and other JSON files; as published by default."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(byte_level([QWEN_SPLIT], [], normalizer=normalizers.NFC()).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(
        f"{left} {right}\n" for left, right in model["merges"]))
    size = len(model["vocab"])
    published = {
        **CLASS, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "chat_template": template("qwen"), "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "added_tokens_decoder": {str(size + n): {
            "content": name, "special": special, "lstrip": False, "rstrip": False,
            "normalized": False, "single_word": False}
            for n, (name, special) in enumerate(QWEN.items())}}
    contents = {"tokenizer_config": published if config is None else config, **more}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


CASES: dict[str, Callable[[Path], Path]] = {
    "published": pair,
    "a bare class": lambda folder: pair(folder, {"tokenizer_class": "Qwen2TokenizerFast"}),
    "a space before": lambda folder: pair(folder, {**CLASS, "add_prefix_space": True,
                                                   "eos_token": "<|im_end|>"}),
    "older files": lambda folder: pair(
        folder, CLASS, added_tokens={"<|endoftext|>": 400, "<|im_end|>": 401, "<word>": 402},
        special_tokens_map={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
}


@pytest.fixture(scope="module", params=CASES)
def qwens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
          ) -> tuple[Tokenizer, Any]:
    """Ours and transformers'."""
    folder = CASES[request.param](tmp_path_factory.mktemp("pair"))
    return Tokenizer(folder), transformers.Qwen2Tokenizer.from_pretrained(folder)


@given(text=any_text)
@example("  It's  1234 Ébé, e\u0301 ﬁ Å\r\n\r\n \t漢字か 😀 \u00a0x")
@settings(deadline=None, max_examples=80)
def test_a_pair_gives_the_tokens_of_transformers(qwens: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = qwens
    assume(not any(name in text for name in [*QWEN, "<word>"]))  # to us they are but text
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def test_added_tokens_of_a_pair(qwens: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = qwens
    assert ours.vocab_size == len(theirs)
    text = "a <|im_end|> b<tool_call>\n<|endoftext|><word>é"
    assert ours._raw.encode(text).ids == theirs(text)["input_ids"]
    assert ours.eos_ids[0] == theirs.eos_token_id and ours.pad_id == theirs.pad_token_id
    assert ours.prompt("a") == ours.encode("a")  # there is no beginning of text
    ours.save(tmp_path)
    for loaded in (transformers.AutoTokenizer.from_pretrained(tmp_path),
                   transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded(text)["input_ids"] == theirs(text)["input_ids"]
    assert loaded.special_tokens_map == theirs.special_tokens_map
    assert Tokenizer(tmp_path).digest == ours.digest


def test_the_template_of_a_pair(tmp_path: Path) -> None:
    ours = Tokenizer(pair(tmp_path))
    theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "  é́ 12 \n"}]
    assert encode(ours, chat) == theirs.apply_chat_template(chat, add_generation_prompt=True,
                                                         return_dict=False)


def test_lines_of_merges_end_in_any_way(tmp_path: Path) -> None:
    usual = Tokenizer(pair(tmp_path))
    lines = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(lines.split(b"\n", 1)[1].replace(b"\n", b"\r\n") + b"\n")
    assert Tokenizer(tmp_path).digest == usual.digest


@pytest.mark.parametrize("kind", ["CodeGenTokenizer", None, 3, ["Qwen2Tokenizer"]])
def test_a_pair_of_an_unknown_class_is_refused(kind: Any, tmp_path: Path) -> None:
    pair(tmp_path, {"tokenizer_class": kind})
    with pytest.raises(VicugnaError, match="tokenizer_class") as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / "vocab.json") in str(caught.value)
    byte_level([r"\s+"], ["<x>"]).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).id_of("<x>") is not None  # tokenizer.json needs no class


def test_added_tokens_with_other_ids_are_refused(tmp_path: Path) -> None:
    for more in ({"config": {**CLASS, "added_tokens_decoder": {"405": {"content": "<|im_end|>"}}}},
                 {"config": CLASS, "added_tokens": {"<|endoftext|>": 400, "<|im_end|>": 410}}):
        with pytest.raises(VicugnaError, match="other ids"):
            Tokenizer(pair(tmp_path, **more))


def test_a_broken_pair_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, CLASS)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    token = next(name for name in vocabulary if len(name) == 2)
    bad = {"vocab.json": [
        "", "{", "[]", "null", json.dumps(vocabulary)[:-9], '{"a":' * 10**5,
        *(json.dumps({**vocabulary, **change}) for change in (
            {token: 3}, {token: -1}, {token: 2**40}, {token: "3"}, {token: None}, {token: 1.5})),
        *(json.dumps({name: id for name, id in vocabulary.items() if name != left})
          for left in ("a", token))],
        "merges.txt": ["#version: 0.2\na b c\n", "a\n", "a zz\n", "a b\n\xff", "\0" * 99]}
    for name, texts in bad.items():
        pair(tmp_path, CLASS)
        for text in texts:
            (tmp_path / name).write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
            with pytest.raises(VicugnaError, match="not a tokenizer") as caught:
                Tokenizer(tmp_path)
            assert str(tmp_path) in caught.value.where and "\n" not in str(caught.value)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(VicugnaError, match="no such file") as caught:
        Tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path / "merges.txt")
    for name in ("merges.txt", "vocab.json"):
        pair(tmp_path, CLASS)
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(VicugnaError, match="bytes are too many"):
            Tokenizer(tmp_path)


# In a checkpoint's folder.

def tiny_llama(folder: Path) -> Path:
    network = models.build({
        "model_type": "llama", "vocab_size": 700, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1})
    models.initialise(network, 0)
    vicugna.Model(network).save(folder)
    return folder


def llama_model(folder: Path) -> None:
    """`tokenizer.model` as Llama 3's."""
    lines = [f"{entry['token_bytes']} {entry['rank']}\n" for entry in TOKENS]
    (folder / "tokenizer.model").write_text("".join(lines))


def mistral_model(folder: Path) -> None:
    (folder / "tekken.json").write_text(json.dumps(FORMS["listed"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "[INST]{{ x }}"}))


@pytest.mark.parametrize("make", [llama_model, mistral_model, *CASES.values()],
                         ids=["tokenizer.model", "tekken.json", *CASES])
def test_a_saved_model_has_a_tokenizer_json(make: Any, tmp_path: Path) -> None:
    """The maker's file is kept beside it."""
    make(tiny_llama(tmp_path / "a"))
    kept = [path for path in (tmp_path / "a").iterdir()
            if path.name in ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")]
    model = vicugna.load(tmp_path / "a")
    for _ in range(2):  # the second time over what was written
        model.save(tmp_path / "b")
    again = vicugna.load(tmp_path / "b")
    assert again.digest == model.digest
    assert again.tokenizer is not None and model.tokenizer is not None
    assert again.tokenizer.templates == model.tokenizer.templates
    assert kept and all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
                        for path in kept)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    for text in TEXTS[:2]:  # the third names control tokens
        assert theirs(text)["input_ids"] == model.tokenizer.prompt(text)
    if "vocab.json" in {path.name for path in kept}:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
        assert type(theirs).__name__ == "Qwen2Tokenizer"
        assert theirs(TEXTS[0])["input_ids"] == model.tokenizer.prompt(TEXTS[0])


@pytest.mark.parametrize("make", [mistral_model, CASES["a bare class"]])
def test_gguf_keeps_what_the_makers_files_say(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    make(tiny_llama(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "b.gguf", lossy=True)
    before, after = (vicugna.load(tmp_path / name).tokenizer for name in ("a", "b.gguf"))
    assert before is not None and after is not None
    assert after.digest == before.digest

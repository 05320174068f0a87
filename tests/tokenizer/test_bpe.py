from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import tokenizer
from vicugna.chat import encode
from vicugna.errors import VicugnaError
from vicugna.tokenizer import MINIMUM_VOCABULARY, StreamDecoder, Tokenizer
from vicugna.tokenizer.bpe import SPECIAL, VISIBLE

any_text = st.text() | st.text(alphabet=" \n\r\t<|>0123abé漢\u2028\ufffd\x00😀")
with_controls = st.lists(st.sampled_from([*SPECIAL, *VISIBLE, " ", "\n", "x", "<|"])).map("".join)


@given(text=any_text | with_controls)
@settings(deadline=None, max_examples=300)
def test_every_text_round_trips_without_control_tokens(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.special_ids.isdisjoint(ids)
    assert tok.decode(ids) == text
    assert b"".join(map(tok.token_bytes, ids)) == text.encode()
    assert tok.encode_batch([text, "a"]) == [ids, tok.encode("a")]
    stream = StreamDecoder(tok)
    assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_every_single_byte_is_a_token(tok: Tokenizer) -> None:
    assert {tok.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert tok.token_bytes(10**9) == b""


def test_digits_are_split_one_by_one(tok: Tokenizer) -> None:
    assert len(tok.encode("2024121212")) == 10


def test_stream_decoder_holds_back_unfinished_characters(tok: Tokenizer) -> None:
    by_byte = {tok.token_bytes(i): i for i in range(256)}
    stream = StreamDecoder(tok)
    pieces = [stream.push(by_byte[bytes([b])]) for b in "é漢😀".encode()]
    assert "".join(pieces) == "é漢😀" and pieces[0] == ""
    stream.push(by_byte[b"\xe6"])
    assert stream.push(tok.eos_ids[0]) == "" and stream.finish() == "\ufffd"


def test_ids_and_sizes(tok: Tokenizer) -> None:
    assert tok.vocab_size == 600
    ids = [tok.id_of(name) for name in (*SPECIAL, *VISIBLE)]
    assert ids == list(range(600 - len(ids), 600))
    assert tok.bos_id == tok.id_of("<|begin_of_text|>") and tok.pad_id == tok.id_of("<|pad|>")
    assert tok.eos_ids == (tok.id_of("<|end_of_text|>"), tok.id_of("<|eot_id|>"))


def test_save_and_load_are_the_same(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.digest == tok.digest and again.eos_ids == tok.eos_ids
    assert (again.bos_id, again.pad_id) == (tok.bos_id, tok.pad_id)
    assert again.encode("Text, 1 2\n") == tok.encode("Text, 1 2\n")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 590]}')
    assert set(Tokenizer(tmp_path).eos_ids) == {*tok.eos_ids, 3, 590}
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert Tokenizer(tmp_path).digest != tok.digest


def test_template_in_the_config_is_read_too(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    chat = [{"role": "user", "content": "x"}]
    with pytest.raises(VicugnaError, match="no chat template"):
        encode(Tokenizer(tmp_path), chat)
    config = {**tok.config, "chat_template": [{"name": "default", "template": tok.template}],
              "bos_token": {"content": tok.config["bos_token"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert encode(Tokenizer(tmp_path), chat) == encode(tok, chat)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", None, "no such file"),
    ("tokenizer.json", "{", "not valid JSON"),
    ("tokenizer.json", "{}", "not a tokenizer"),
    ("tokenizer_config.json", "[]", "not a JSON object"),
    ("tokenizer_config.json", '{"chat_template": [1]}', "not a tokenizer"),
])
def test_broken_files(tok: Tokenizer, tmp_path: Path, name: str, content: str | None,
                      message: str) -> None:
    tok.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(VicugnaError, match=message) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_training_says_what_is_wrong() -> None:
    with pytest.raises(VicugnaError, match=f"at least {MINIMUM_VOCABULARY}"):
        tokenizer.train(["text"], 100)
    for empty in ([], ["", ""]):
        with pytest.raises(VicugnaError, match="no text"):
            tokenizer.train(empty, 300)
    with pytest.raises(VicugnaError, match="too few to learn 5000 tokens"):
        tokenizer.train(["a few words, a few words"], 5000)
    with pytest.raises(VicugnaError, match="surrogate"):
        tokenizer.train(["\ud800"], 300)
    assert tokenizer.train(["x"], MINIMUM_VOCABULARY).vocab_size == MINIMUM_VOCABULARY


def test_lone_surrogates_are_refused(tok: Tokenizer) -> None:
    with pytest.raises(VicugnaError, match="surrogate"):
        tok.encode("a\ud800")
    with pytest.raises(VicugnaError, match="surrogate"):
        encode(tok, [{"role": "user", "content": "a\udfff"}])


@pytest.mark.parametrize("parallelism", ["true", "false"])
def test_training_gives_the_same_bytes_in_every_process(
        tok: Tokenizer, corpus: list[str], parallelism: str) -> None:
    program = ("import json, sys; from vicugna import tokenizer;"
               "print(tokenizer.train(json.load(sys.stdin), 600).digest)")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallelism, "PYTHONHASHSEED": "7",
                   "PYTHONPATH": str(Path(tokenizer.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(corpus), text=True,
                          capture_output=True, env=environment, check=True)
    assert done.stdout.strip() == tok.digest

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from families import FAMILIES, byte_level, llama2, llama3, mistral, nemo, qwen2, r1, template, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from vicugna.chat import ReplyParser, encode, encode_training, parse_reply, render
from vicugna.errors import VicugnaError
from vicugna.tokenizer import StreamDecoder, Tokenizer

transformers = pytest.importorskip("transformers")

TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds é <b> \"x\" \n & more", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "enum": [1, 2]}},
        "required": ["a"]}}}]
SYSTEM = {"role": "system", "content": " Be  brief.\n"}
USER = {"role": "user", "content": "\n  What is 2 + 3 < 7? 漢字 é́ 😀 "}
ANSWER = {"role": "assistant", "content": " 5, of course\n"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "abcdefghi", "type": "function",
     "function": {"name": "add", "arguments": {"a": 2, "b": "é <x>"}}}]}
SAID_CALL = {**CALL, "content": "Let me add."}
TEXT_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
DECODED_CALLS = [
    {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
RESULT = {"role": "tool", "content": '{"sum": 5, "<|eot|>": 1}', "tool_call_id": "abcdefghi"}
THOUGHT = {"role": "assistant", "content": "<think>\n2+3\n</think>\n\n5"}
PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "},
                                       {"type": "image", "url": "x"}]}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER], "system": [SYSTEM, USER], "turns": [SYSTEM, USER, ANSWER, USER],
    "finished": [USER, ANSWER, USER, ANSWER], "call": [USER, CALL],
    "result": [SYSTEM, USER, SAID_CALL, RESULT, ANSWER, USER],
    "text call": [USER, TEXT_CALL, RESULT], "two results": [USER, CALL, RESULT, RESULT],
    "thought": [USER, THOUGHT, USER],
    "reasoning": [USER, {**ANSWER, "reasoning": "2+3"}, USER],
    "older reasoning": [USER, {**ANSWER, "reasoning_content": "2+3", "tool_calls": None}],
    "picture": [SYSTEM, PICTURE, ANSWER, PICTURE], "doubled": [SYSTEM, USER, USER]}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Every family's tokenizer, ours and transformers', from the same files."""
    folders = {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}
    folders["tour"] = write(
        tmp_path_factory.mktemp("tour"), tokenizers.Tokenizer.from_file(
            str(folders["llama3"] / "tokenizer.json")), template("tour"),
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return {name: (Tokenizer(folder), load(folder)) for name, folder in folders.items()}


def load(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


names = pytest.mark.parametrize("name", [*FAMILIES, "tour"])


@names
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=list(CHATS))
def test_templates_render_as_transformers_does(pairs: dict[str, tuple[Tokenizer, Any]], name: str,
                                               tools: Any, chat: list[dict[str, Any]]) -> None:
    ours, theirs = pairs[name]
    # Arguments that are JSON text are given to other templates as vLLM does: decoded.
    known = chat if name in ("deepseek", "r1") else [
        {**one, "tool_calls": DECODED_CALLS} if one is TEXT_CALL else one for one in chat]
    for prompt in (False, True):
        options = {"tools": tools, "add_generation_prompt": prompt}
        try:
            text = theirs.apply_chat_template(known, tokenize=False, **options)
        except Exception:
            with pytest.raises(VicugnaError, match="chat template"):
                render(ours, chat, tools, prompt)
            continue
        if str(chat[-1]["content"]) in text and isinstance(chat[-1]["content"], list):
            with pytest.raises(VicugnaError, match="takes text only"):
                render(ours, chat, tools, prompt)
            continue
        assert render(ours, chat, tools, prompt) == text
        hostile = any(control in repr((chat, tools)) for control in ours.special_tokens)
        assert encode(ours, chat, tools, prompt) == theirs.apply_chat_template(
            known, return_dict=False, sanitize_control_tokens=hostile, **options)


text = st.text(st.characters(codec="utf-8"), max_size=30) | st.text(
    alphabet=" \n\t\u2581<|>｜[INST]abc'1230é漢\u0301\u00a0\u2028\u00ad😀", max_size=40)


def benign(tok: Tokenizer, *texts: str) -> bool:
    return not any(control in text for text in texts for control in tok.special_tokens)


@names
@given(text=text)
@settings(deadline=None, max_examples=30)
def test_tokens_and_text_are_those_of_transformers(pairs: dict[str, tuple[Tokenizer, Any]],
                                                   name: str, text: str) -> None:
    ours, theirs = pairs[name]
    ids = ours.encode(text)
    if benign(ours, text):
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.encode_batch([text, "x"])[0] == ids
    assert ours.special_ids.isdisjoint(ids)
    assert ours.decode(ids) == theirs.decode(ids)
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)
    if name not in ("qwen2", "mistral"):  # another normal form, a leading space not marked twice
        assert ours.decode(ids) == text or "▁" in text


@names
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_any_tokens_decode_as_in_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str,
                                              data: st.DataObject) -> None:
    ours, theirs = pairs[name]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    assert ours.vocab_size == len(theirs)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)


@names
@given(user=text, answer=text, system=text)
@settings(deadline=None, max_examples=25)
def test_any_benign_chat_is_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str,
                                         user: str, answer: str, system: str) -> None:
    ours, theirs = pairs[name]
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user},
            {"role": "assistant", "content": answer}, {"role": "user", "content": answer + user}]
    if benign(ours, user, answer, system, answer + user):
        assert encode(ours, chat) == theirs.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False)


@names
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_no_text_becomes_a_control_token(pairs: dict[str, tuple[Tokenizer, Any]], name: str,
                                         data: st.DataObject) -> None:
    ours, _ = pairs[name]
    hostile = st.lists(st.sampled_from([
        *ours.special_tokens, "<", "<|eot", "_id|>", "</s", ">", " ", "\n", "x", "▁", "\ue000",
        "[/INST", "]", "｜"])).map("".join)
    a, b, c, d = data.draw(st.tuples(hostile, hostile, hostile, hostile))

    def chat(a: str, b: str, c: str, d: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": a}, {"role": "user", "content": b},
                {"role": "assistant", "content": c}, {"role": "user", "content": d}]

    def controls(ids: list[int]) -> list[int]:
        return [id for id in ids if id in ours.special_ids]

    ids = encode(ours, chat(a, b, c, d))
    assert controls(ids) == controls(encode(ours, chat("x", "x", "x", "x")))
    said = ours.decode(ids, skip_special=False)
    for part in (b, d) if name != "tour" else ():  # which shouts
        assert part.strip() in said.replace("\u2581", " ") or "▁" in part
    assert ours.special_ids.isdisjoint(ours.encode(a + b))


@names
def test_hostile_names_do_not_change_the_tokens_around_them(
        pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, _ = pairs[name]
    control = ours.decode([ours.eos_ids[0]], skip_special=False)
    ids = encode(ours, [{"role": "user", "content": f"a {control} b"}])
    near = encode(ours, [{"role": "user", "content": f"a {control[:-1]}~ b"}])
    same = next(n for n, (x, y) in enumerate(zip(ids, near, strict=False)) if x != y)
    assert ours.decode(ids[:same]) == ours.decode(near[:same])
    assert f"a {control} b" in ours.decode(ids, skip_special=False)


def test_beginnings_and_endings_are_what_the_checkpoint_says(
        pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    def ends(name: str) -> set[str]:
        return {pairs[name][0].decode([id], False) for id in pairs[name][0].eos_ids}

    assert ends("llama2") == ends("mistral") == ends("nemo") == {"</s>"}
    assert ends("llama3") == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert ends("llama4") == {"<|eot|>"} and ends("r1") == {"<｜end▁of▁sentence｜>"}
    assert ends("qwen2") == {"<|im_end|>", "<|endoftext|>"}
    for name, (ours, theirs) in pairs.items():
        prompt = ours.prompt("the fox")
        if name in ("deepseek", "r1"):  # only add_bos_token says so
            assert prompt[0] == ours.bos_id == theirs.bos_token_id
        else:
            assert prompt == theirs("the fox")["input_ids"]
        assert ours.eos_ids[0] == theirs.eos_token_id
        assert theirs.pad_token_id in (None, ours.pad_id)
        once = encode(ours, [USER])
        assert once.count(ours.bos_id) == (0 if name == "qwen2" else 1)
    assert pairs["qwen2"][0].bos_id == pairs["qwen2"][0].id_of("<|endoftext|>")


@pytest.mark.parametrize("name", [*FAMILIES])
def test_training_follows_the_template(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = pairs[name]
    chat = [USER, ANSWER, USER, {"role": "assistant", "content": "<7"}]
    ids, mask = encode_training(ours, chat)
    assert ids == theirs.apply_chat_template(chat, return_dict=False)
    said = [id for id, mine in zip(ids, mask, strict=True) if mine]
    assert [id for id in said if id in ours.special_ids] == [ours.eos_ids[0]] * 2
    words = ours.decode(said)
    assert words.split() == ["5,", "of", "course", "<7"] or words.replace(" ", "") == "5,ofcourse<7"


def test_reasoning_that_the_template_opens(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, _ = pairs["r1"]
    prompt = encode(ours, [USER])
    assert ReplyParser(ours, prompt).in_reasoning
    assert not ReplyParser(ours, prompt[:-2]).in_reasoning
    end = ours.id_of("</think>") or 0
    reply = [*ours.encode("\n2+3\n"), end, *ours.encode("\n\n5"), ours.eos_ids[0]]
    assert parse_reply(ours, reply, prompt) == ("2+3", "5")
    assert parse_reply(ours, reply[:2], prompt) == (ours.decode(reply[:2]).strip("\n"), "")
    ids, mask = encode_training(ours, [USER, CALL])
    assert ids == encode(ours, [USER, CALL], add_generation_prompt=False)
    assert ids[mask.index(True)] == ours.id_of("<｜tool▁calls▁begin｜>")
    with pytest.raises(VicugnaError, match="leaves out the assistant's reasoning") as caught:
        encode_training(ours, [USER, THOUGHT])
    assert caught.value.where == "messages[1]"


def test_reasoning_in_plain_text(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, _ = pairs["llama3"]
    assert ours.id_of("<think>") is None
    assert parse_reply(ours, ours.encode("<think>\n2+3</think>\n5")) == ("2+3", "5")
    assert parse_reply(ours, ours.encode("5 </think>")) == (None, "5 </think>")
    opened = ours.encode("hi <think>\n")
    assert parse_reply(ours, ours.encode("2+3</think>5"), opened) == ("2+3", "5")
    assert parse_reply(ours, ours.encode("2+3"), opened) == ("2+3", "")


@pytest.mark.parametrize("name", [*FAMILIES])
def test_saved_files_mean_the_same(pairs: dict[str, tuple[Tokenizer, Any]], name: str,
                                   tmp_path: Path) -> None:
    ours, theirs = pairs[name]
    ours.save(tmp_path)
    again, reread = Tokenizer(tmp_path), load(tmp_path)
    assert again.digest == ours.digest and again.config.keys() == ours.config.keys()
    for tools in (None, TOOLS):
        chat = [USER, ANSWER, USER]
        assert encode(again, chat, tools=tools) == encode(ours, chat, tools=tools)
        assert reread.apply_chat_template(chat, tools=tools) == theirs.apply_chat_template(
            chat, tools=tools)
    assert reread("a b")["input_ids"] == theirs("a b")["input_ids"]
    assert reread.special_tokens_map == theirs.special_tokens_map
    theirs.save_pretrained(tmp_path / "theirs")
    back = Tokenizer(tmp_path / "theirs")
    assert encode(back, [USER], tools=TOOLS) == encode(ours, [USER], tools=TOOLS)
    assert back.prompt("a b")[-2:] == ours.prompt("a b")[-2:]


def test_templates_are_found_wherever_they_are(tmp_path: Path) -> None:
    qwen2(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer(tmp_path).template == "json"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        config | {"chat_template": [{"name": "default", "template": "list"},
                                    {"name": "rag", "template": "other"}]}))
    assert Tokenizer(tmp_path).templates == {"default": "list", "rag": "other"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | length }}")
    (tmp_path / "chat_template.jinja").write_text("plain")
    tok = Tokenizer(tmp_path)
    assert render(tok, [USER]) == "plain" and render(tok, [USER], tools=TOOLS) == "1"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": 3}))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates/tool_use.jinja").unlink()
    with pytest.raises(VicugnaError, match="not a tokenizer"):
        Tokenizer(tmp_path)


def test_tokens_that_only_other_files_name(tmp_path: Path) -> None:
    raw = byte_level([r"\s+"], ["<s>"])
    raw.add_tokens(["plain"])
    write(tmp_path, raw, None, added_tokens_decoder=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True, "normalized": False,
                                          "rstrip": False, "single_word": False},
        "additional_special_tokens": ["<x>"]}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"older": raw.get_vocab_size()}))
    (tmp_path / "config.json").write_text(json.dumps(
        {"bos_token_id": 3, "pad_token_id": 7, "eos_token_id": [5, 10**9, None, True],
         "model_type": "llama"}))
    ours, theirs = Tokenizer(tmp_path), load(tmp_path)
    text = "a plain older </s> <x> <s> b"
    assert ours._raw.encode(text).ids == theirs.encode(text)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.pad_id) == (theirs.bos_token_id, 7)
    assert ours.eos_ids == (theirs.eos_token_id, 5)
    ours.save(tmp_path / "saved")
    assert load(tmp_path / "saved").encode(text) == theirs.encode(text)


def test_names_that_merges_or_words_spell(tmp_path: Path) -> None:
    """tokenizer.json may let ordinary text merge into a control token; we do not."""
    for folder, ignore in ((tmp_path / "merges", False), (tmp_path / "words", True)):
        raw = tokenizers.Tokenizer(tokenizers.models.BPE(
            {name: id for id, name in enumerate(["<", "/", "s", ">", "</", "s>", "</s>", "x"])},
            [("<", "/"), ("s", ">"), ("</", "s>")] if not ignore else [("<", "/")],
            ignore_merges=ignore))
        if ignore:
            raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        raw.add_special_tokens(["</s>"])
        tok = Tokenizer(write(folder, raw, "{{ messages[0].content }}{{ eos_token }}",
                              eos_token="</s>"))
        plain = tok.encode("x</s>")
        assert tok.special_ids.isdisjoint(plain) and tok.token_bytes(plain[-1]) != b"</s>"
        assert b"".join(map(tok.token_bytes, plain)) == b"x</s>"
        assert encode(tok, [{"role": "user", "content": "</s>"}]) == [*tok.encode("</s>"), 6]


def test_control_tokens_that_files_describe_oddly(tmp_path: Path) -> None:
    raw = byte_level([r"\s+"], [])
    raw.add_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True),
                    AddedToken("<s>", single_word=True, special=True)])
    write(tmp_path / "a", raw, "<s>{{ messages[0].content }} <|end|>\n x<s>y <s> <|end|>")
    ours, theirs = Tokenizer(tmp_path / "a"), load(tmp_path / "a")
    chat = [{"role": "user", "content": " the fox "}]
    assert encode(ours, chat) == theirs.apply_chat_template(chat, return_dict=False)
    # Llama 1: a control token that is looked for in text which begins with ▁.
    raw = tokenizers.Tokenizer.from_file(str(llama2(tmp_path / "b") / "tokenizer.json"))
    content = json.loads(raw.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(content))
    tok, turns = Tokenizer(tmp_path / "b"), [USER, ANSWER, USER]
    spoken = [id for id in encode(tok, turns) if id in tok.special_ids]
    assert spoken == [tok.bos_id, tok.eos_ids[0], tok.bos_id]


def test_control_tokens_that_are_words(tmp_path: Path) -> None:
    raw = byte_level([r"\s+"], ["madeup0", "Human:", "</s>"])
    tok = Tokenizer(write(tmp_path, raw, "{% for m in messages %}{% if m.role == 'user' %}Human:"
                                         "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
                          eos_token="</s>"))
    text = "Human: a madeup0, madeup00: content Human:"
    ids = encode(tok, [{"role": "user", "content": text}])
    assert [id for id in ids if id in tok.special_ids] == [tok.id_of("Human:"), tok.id_of("</s>")]
    assert tok.decode(ids, skip_special=False) == f"Human:{text}</s>"


def test_a_vocabulary_with_holes(tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(
        {"a": 0, "<s>": 1, "<t>": 2, "b": 5, "ab": 6}, [("a", "b")]))
    raw.add_special_tokens(["<s>", "<t>"])
    tok = Tokenizer(write(tmp_path, raw, "{{ bos_token }}{{ messages[0].content }}<t>",
                          bos_token="<s>"))
    ids = encode(tok, [{"role": "user", "content": "ab<s>a"}])
    assert ids == raw.encode("<s>ab").ids + raw.encode("a<t>").ids


@pytest.mark.parametrize("make", [llama2, llama3, mistral, nemo, qwen2, r1])
def test_broken_tokenizers_are_refused(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in (("model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}),
                       ("model", {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}),
                       ("model", {**content["model"], "merges": [["zz", "zzz"]]}),
                       ("model", {**content["model"], "continuing_subword_prefix": "x"}),
                       ("decoder", {"type": "Nothing"}), ("added_tokens", 3),
                       ("post_processor", {  # over which the library panics
                           "type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single":
                           [{"SpecialToken": {"id": "x", "type_id": 0}}]}),
                       ("added_tokens", [{"id": 2**40, "content": "<s>"}])):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(VicugnaError, match="not a tokenizer"):
            Tokenizer(tmp_path)
    for raw in ("", "{", "[" * 10**5, "null", '{"model": 1e999}'):
        path.write_text(raw)
        with pytest.raises(VicugnaError):
            Tokenizer(tmp_path)

"""What is learned of a chat: all that the assistant said, or there is an error."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

from vicugna import chat, checkpoint, data
from vicugna.chat import encode, encode_training, parse_reply, render
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is 2 + 3?"}
THOUGHT = {"role": "assistant", "content": "5", "reasoning": "First 2,\nthen 3 more."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function",
     "function": {"name": "add", "arguments": {"a": 2, "b": ["é <x>", None, True, 1.5]}}}]}
NO_PLACE = ["llama2", "llama3", "llama4", "mistral", "nemo", "qwen2", "smollm2"]
CUTS = ["deepseek", "r1"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: Tokenizer(make(tmp_path_factory.mktemp(name)))
            for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    """Of the installed package, if it is there."""
    try:
        tokenizer = checkpoint.read("smollm2").tokenizer
    except VicugnaError as error:
        pytest.skip(str(error))
    assert tokenizer is not None
    return tokenizer


def tokenizer_of(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    if name in ("smollm2", "tok"):
        return request.getfixturevalue(name)
    return request.getfixturevalue("families")[name]


def learned(tok: Tokenizer, messages: list[dict[str, Any]]) -> tuple[list[int], str]:
    """The tokens with loss, and their text."""
    ids, mask = encode_training(tok, messages)
    mine = [id for id, one in zip(ids, mask, strict=True) if one]
    return mine, tok.decode(mine)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("name", [*NO_PLACE, "tok"])
def test_reasoning_is_learned(name: str, key: str, request: pytest.FixtureRequest) -> None:
    """Where the template has no place for it, before the content; it is parsed as reasoning."""
    tok = tokenizer_of(name, request)
    message = {"role": "assistant", "content": "5", key: THOUGHT["reasoning"]}
    mine, text = learned(tok, [USER, message])
    assert "<think>" in text and text.replace(" ", "").strip().endswith("</think>5"
        if name == "tok" else "</think>\n\n5")
    reasoning, answer = parse_reply(tok, mine, encode(tok, [USER]))
    assert (reasoning, answer.strip()) == (THOUGHT["reasoning"], "5")
    for id in (tok.id_of("<think>"), tok.id_of("</think>")):
        assert id is None or mine.count(id) == 1


@pytest.mark.parametrize("content", [
    "<think>\nFirst 2,\nthen 3 more.\n</think>\n\n5", "<think>First 2,\nthen 3 more.</think>5"])
@pytest.mark.parametrize("name", [*NO_PLACE, "tok"])
def test_reasoning_in_the_content_is_the_same(name: str, content: str,
                                              request: pytest.FixtureRequest) -> None:
    tok = tokenizer_of(name, request)
    assert encode_training(tok, [USER, {"role": "assistant", "content": content}]) == (
        encode_training(tok, [USER, THOUGHT]))


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("message", [
    THOUGHT, {"role": "assistant", "content": "<think>First</think>5"},
    {"role": "assistant", "content": "5", "thinking": "5"}])
def test_reasoning_that_a_template_cuts_off_is_an_error(families: dict[str, Tokenizer], name: str,
                                                        message: dict[str, Any]) -> None:
    with pytest.raises(VicugnaError, match="leaves out the assistant's reasoning") as caught:
        encode_training(families[name], [USER, message])
    assert caught.value.where == "messages[1]"


def test_the_error_names_file_and_line(families: dict[str, Tokenizer], tmp_path: Path) -> None:
    lines = [json.dumps({"messages": chat}) for chat in (
        [USER, {"role": "assistant", "content": "5"}], [USER, THOUGHT])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for source, where in ((str(tmp_path / "a.jsonl"), "a.jsonl line 2, messages[1]"),
                          ("task:reasoning.steps", "task:reasoning.steps, messages[1]")):
        with pytest.raises(VicugnaError, match="leaves out") as caught:
            data.open_stream([source], families["r1"], 2000, 0, tmp_path / "cache").row(0)
        assert caught.value.where.endswith(where)


def test_an_earlier_turn_that_loses_its_reasoning(tok: Tokenizer) -> None:
    """Qwen3's template drops the reasoning of all turns but the last."""
    source = ("{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
              "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
              "{% endif %}{{ m.content.split('</think>')[-1] }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
              "{% endif %}")
    last = Tokenizer.of(tok.json, tok.config, source)
    assert parse_reply(last, learned(last, [USER, THOUGHT])[0]) == (THOUGHT["reasoning"], "5")
    plain = {"role": "assistant", "content": "5"}
    assert learned(last, [USER, plain, USER, THOUGHT])[1].startswith("5<think>")
    with pytest.raises(VicugnaError, match="reasoning") as caught:
        encode_training(last, [USER, THOUGHT, USER, THOUGHT])
    assert caught.value.where == "messages[1]"


@pytest.mark.parametrize(("source", "part"), [
    ("{{ m.content | upper }}", "content"), ("{{ m.content[:3] }}", "content"),
    ("{{ m.content }}", "tool calls"),
    ("{{ m.content }}{{ m.tool_calls | map(attribute='function.name') | join }}", "tool calls"),
    ("{{ m.content }}{{ m.tool_calls | map(attribute='function.arguments') | list | tojson }}",
     "tool calls"), ("{{ m.tool_calls | tojson }}", "content")])
def test_anything_left_out_is_an_error(tok: Tokenizer, source: str, part: str) -> None:
    template = ("{% for m in messages %}<|start_header_id|>{% if m.tool_calls %}" + source +
                "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}")
    whole = {**CALL, "content": "Let me add."}
    cut = Tokenizer.of(tok.json, tok.config, template)
    with pytest.raises(VicugnaError, match=f"leaves out the assistant's {part}"):
        encode_training(cut, [USER, whole])


@pytest.mark.parametrize("name", ["llama4", "mistral", "nemo", "qwen2", "deepseek", "r1", "tok",
                                  "llama3"])
def test_calls_are_learned(name: str, request: pytest.FixtureRequest) -> None:
    tok = tokenizer_of(name, request)
    _, text = learned(tok, [USER, CALL])
    assert '"add"' in text or name in CUTS
    written = [text, text.replace("'", '"')]
    assert any("é <x>" in one and '"a"' in one for one in written)
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is 5."}]
    if name in ("llama4", "tok"):
        answer = {"role": "assistant", "content": parts}
        if name == "llama4":
            assert learned(tok, [USER, answer])[1] == "Itis 5."
        else:  # which takes text only
            with pytest.raises(VicugnaError, match="takes text only"):
                learned(tok, [USER, answer])


# Calls' arguments that are JSON text.

TEXT = '{"a":2,  "b": [1]}'
TEXT_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"function": {"name": "add", "arguments": TEXT}}]}


@pytest.mark.parametrize(("source", "due"), [
    ("{{ f.arguments }}", TEXT), ("{{ f.arguments | string }}", TEXT),
    ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", TEXT),
    ("{{ '```' ~ f.arguments }}", f"```{TEXT}"), ("{{ '```' + f.arguments }}", f"```{TEXT}"),
    ("{{ f.arguments | tojson }}", '{"a": 2, "b": [1]}'),
    ("{{ f | tojson }}", '{"name": "add", "arguments": {"a": 2, "b": [1]}}'),
    ("{{ [f] | tojson(indent=None) }}", '[{"name": "add", "arguments": {"a": 2, "b": [1]}}]'),
    ("{% for key, value in f.arguments | items %}{{ key }}{{ value }};{% endfor %}", "a2;b[1];"),
    ("{% for key, value in f.arguments.items() %}{{ key }}{{ value }};{% endfor %}", "a2;b[1];")])
def test_arguments_are_not_encoded_twice(tok: Tokenizer, families: dict[str, Tokenizer],
                                         source: str, due: str) -> None:
    template = "{% set f = messages[1].tool_calls[0].function %}" + source
    for made in (tok, families["mistral"]):  # of whose special tokens "[" is escaped
        assert render(Tokenizer.of(made.json, made.config, template), [USER, TEXT_CALL]) == due


@pytest.mark.parametrize("text", ["not JSON", "[1]", "3", '"x"', "{", ""])
def test_arguments_that_are_other_text_stay_text(tok: Tokenizer, text: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": text}]}
    made = Tokenizer.of(tok.json, tok.config, "{{ messages[1].tool_calls[0].arguments | tojson }}")
    assert render(made, [USER, call]) == json.dumps(text)


def test_json_text_cannot_spell_a_special_token(tok: Tokenizer) -> None:
    made = Tokenizer.of(tok.json, tok.config, "{{ messages[1].tool_calls[0].arguments | tojson }}")
    for text in ('{"a": "<|eot_id|>"}', '{"a": "\\u003c|eot_id|>"}', '{"\\u003cthink>": 1}'):
        calls = [{"name": "f", "arguments": text}]
        ids = encode(made, [USER, {"role": "assistant", "content": "", "tool_calls": calls}])
        assert tok.special_ids.isdisjoint(ids) and json.loads(tok.decode(ids)) == json.loads(text)


def test_tools_must_be_objects(tok: Tokenizer) -> None:
    for tools in ("[]", ["add"], {"name": "add"}, [None]):
        with pytest.raises(VicugnaError, match="tools must be a list of objects"):
            encode(tok, [USER], tools)  # type: ignore[arg-type]


# The day that a template may ask for.

def test_a_fixed_date_gives_the_same_every_day(tok: Tokenizer, tmp_path: Path) -> None:
    source = ("{{ strftime_now('%d %b %Y %H:%M') }}{% for m in messages %}{{ m.content }}<|eot_id|>"
              "{% endfor %}")
    dated, day = Tokenizer.of(tok.json, tok.config, source), datetime.date(2024, 7, 26)
    assert render(dated, [USER], date=day).startswith("26 Jul 2024 00:00")
    written = dated.encode(f"26 Jul 2024 00:00{USER['content']}")
    assert encode(dated, [USER], date=day) == [*written, tok.id_of("<|eot_id|>")]
    today = datetime.datetime.now().strftime("%Y")
    assert today in render(dated, [USER])
    answer = {"role": "assistant", "content": "5"}
    assert encode_training(dated, [USER, answer], date=day)[0][:9] == (
        encode(dated, [USER], date=day)[:9])
    other = datetime.date(2024, 7, 27)
    assert chat.digest(dated, day) != chat.digest(dated, other)
    assert chat.digest(tok, day) == chat.digest(tok, other) == tok.digest
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, answer]}))
    rows = [data.open_stream([source], dated, 200, 0, tmp_path / "cache", date=one).row(0)
            for one in (day, day, other) for source in (str(tmp_path / "a.jsonl"),)]
    assert (rows[0].tokens == rows[1].tokens).all() and (rows[0].tokens != rows[2].tokens).any()


def test_nothing_is_drawn_at_random(tok: Tokenizer) -> None:
    made = Tokenizer.of(tok.json, tok.config, "{{ ['a', 'b'] | random }}")
    with pytest.raises(VicugnaError, match="random"):
        render(made, [USER])

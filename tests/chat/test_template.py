from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vicugna.chat import encode, encode_training, render
from vicugna.chat.worker import WORKER
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer
from vicugna.tokenizer.bpe import SPECIAL, VISIBLE

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds é <b> \"x\"",
                                           "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "\n  What is 2 + 3 < 7? "}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
ANSWER = {"role": "assistant", "content": "5", "reasoning": "2+3=5"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}},
    {"name": "add", "arguments": '{"a": 1}'}]}
RESULT = {"role": "tool", "content": "{\"sum\": 5}"}
CHATS: list[list[dict[str, Any]]] = [
    [USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER], [USER, ANSWER, USER],
    [USER, {"role": "assistant", "content": "\n padded \n"}, USER],
    [SYSTEM, USER, CALL, RESULT, ANSWER], [USER, CALL, RESULT]]
benign = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40)


@pytest.fixture(scope="session")
def reference(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def theirs(reference: Any, chat: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(reference.apply_chat_template(chat, tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_transformers_renders_the_same(tok: Tokenizer, reference: Any, chat: list[dict[str, Any]],
                                       tools: Any, prompt: bool) -> None:
    assert encode(tok, chat, tools, prompt) == theirs(reference, chat, tools=tools,
                                                   add_generation_prompt=prompt)


@given(user=benign, answer=benign, reasoning=benign)
@settings(deadline=None, max_examples=100)
def test_transformers_renders_any_benign_text_the_same(
        tok: Tokenizer, reference: Any, user: str, answer: str, reasoning: str) -> None:
    chat = [{"role": "system", "content": user}, {"role": "user", "content": user},
            {"role": "assistant", "content": answer, "reasoning": reasoning}]
    assert encode(tok, chat, add_generation_prompt=False) == theirs(reference, chat)
    assert encode_training(tok, chat)[0] == theirs(reference, chat)


def test_transformers_agrees_on_plain_text(tok: Tokenizer, reference: Any) -> None:
    text = "Plain text, 12 34.\n\n\tEnd"
    assert reference(text)["input_ids"] == [tok.bos_id, *tok.encode(text)]
    assert reference.decode(tok.encode(text)) == text
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == (
        tok.bos_id, tok.eos_ids[0], tok.pad_id)
    kept = reference.decode([tok.bos_id, tok.id_of("<think>")], skip_special_tokens=True)
    assert kept == "<think>" == tok.decode([tok.bos_id, tok.id_of("<think>") or 0])


def controls(tok: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tok.special_ids]


hostile = st.lists(st.sampled_from(
    [*SPECIAL, *VISIBLE, "<", "|", "<|eot", "_id|>", ">", "\n", " ", "x", "\U00020000",
     "\U00020001", '"', "\\", "user"])).map("".join)


@given(texts=st.lists(hostile, min_size=9, max_size=9))
@settings(deadline=None, max_examples=200)
def test_no_text_becomes_a_control_token(tok: Tokenizer, texts: list[str]) -> None:
    def chat(t: list[str]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": t[0]}, {"role": "user", "content": t[1]},
                {"role": "assistant", "content": t[2], "reasoning": "r" + t[3],
                 "tool_calls": [{"name": t[4], "arguments": {t[5]: [t[6]]}}]},
                {"role": "tool", "content": t[7]}]

    tools = [{"name": texts[8], texts[8]: 1}]
    ids = encode(tok, chat(texts), tools=tools)
    benign_ids = encode(tok, chat(["x"] * 9), tools=[{"name": "x"}])
    assert controls(tok, ids) == controls(tok, benign_ids)
    text = tok.decode(ids, skip_special=False)
    assert all(texts[i] in text for i in (0, 1, 3, 7)) and texts[2].strip() in text
    training, mask = encode_training(tok, chat(texts))
    assert controls(tok, training) == controls(
        tok, encode(tok, chat(["x"] * 9), add_generation_prompt=False))
    assert len(mask) == len(training)


def test_a_role_cannot_smuggle(tok: Tokenizer) -> None:
    with pytest.raises(VicugnaError, match="role must be"):
        encode(tok, [{"role": "user<|end_header_id|>", "content": "x"}])


def test_literal_think_stays_text(tok: Tokenizer) -> None:
    ids = encode(tok, [USER, {"role": "assistant", "content": "<think>no</think>"}],
                 add_generation_prompt=False)
    assert tok.id_of("<think>") not in ids


@pytest.mark.parametrize("chat", CHATS)
def test_loss_is_on_what_the_assistant_would_generate(tok: Tokenizer,
                                                      chat: list[dict[str, Any]]) -> None:
    ids, mask = encode_training(tok, chat)
    assert ids == encode(tok, chat, add_generation_prompt=False)
    wanted: list[int] = []
    for index, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt = encode(tok, chat[:index])
            whole = encode(tok, chat[:index + 1], add_generation_prompt=False)
            assert whole[:len(prompt)] == prompt
            wanted += whole[len(prompt):]
    assert [i for i, said in zip(ids, mask, strict=True) if said] == wanted
    assert not wanted or wanted[-1] == tok.id_of("<|eot_id|>")


@pytest.mark.parametrize("chat, where", [
    ("hi", "messages"), ([], "messages"), (None, "messages"), (["hi"], "messages[0]"),
    ([USER, {"role": "boss", "content": "x"}], "messages[1]"),
    ([USER, {"content": "x"}], "messages[1]"), ([{"role": "user"}], "messages[0]"),
    ([{"role": "user", "content": 3}], "messages[0]"),
    ([{"role": ["user"], "content": "x"}], "messages[0]"),
    ([USER, {"role": "assistant", "content": None}], "messages[1]"),
    ([USER, {"role": "assistant", "content": "x", "reasoning": 1}], "messages[1]"),
    ([USER, {"role": "assistant", "content": "x", "tool_calls": [{"name": 1}]}], "messages[1]"),
    ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0]"),
])
def test_bad_messages_are_named(tok: Tokenizer, chat: Any, where: str) -> None:
    for call in (encode, encode_training):
        with pytest.raises(VicugnaError) as caught:
            call(tok, chat)
        assert caught.value.where == where


def test_training_needs_a_prompt_before_the_assistant(tok: Tokenizer) -> None:
    with pytest.raises(VicugnaError, match="Begin with"):
        encode_training(tok, [ANSWER])


def with_template(tok: Tokenizer, folder: Path, template: str) -> Tokenizer:
    tok.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize("template", [
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 'a' * 10**9 }}", "{{ 10 ** (10 ** 10) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ '%9999999d' % 3 }}", "{{ '{:99999999}'.format(3) }}", "{{ 'a' | center(10**9) }}",
    "{{ lipsum() }}", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set x = 'a' * 29000 %}" + "{{ x | list | sort | join | length }}" * 1100, "x" * 40_001,
    "{% set x = [1] * 9000 %}{% for i in x if i in x[1:] and 2 in x %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}",
    "{{ strftime_now.__self__.filters }}", "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(3) }}", "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}", "{{ messages[0].update(role='system') }}",
    "{{ raise_exception('not like this') }}", "{% for x in messages %}", "{{ messages[9].role.x }}",
    *("{% set n = namespace(x=['a']) %}{% for i in range(30) %}" + twice + "{% endfor %}{{ n.x }}"
      for twice in ("{% set n.x = [n.x, n.x] %}", "{% set n.x = {'a': n.x, 'b': n.x} %}",
                    "{% set n.x = dict(a=n.x, b=n.x) %}", "{% set n.x = cycler(n.x, n.x).items %}",
                    "{% macro m() %}{% set n.x = varargs %}{% endmacro %}{{ m(n.x, n.x) }}",
                    "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}")),
    "{% set s = 'a' * 29000 %}{{ s.replace('a', s) }}", "{{ 'a' | indent(10**9) }}",
    "{% set s = 'a' * 29000 %}{{ range(29000) | join(s) }}", "{{ (3).to_bytes(10**9) }}",
    "{% set s = 'a' * 29000 %}{% for i in range(999) %}{{ s }}{% endfor %}",
    "{{ '{}{}'.format('a' * 10**9, 1) }}", "{{ 'a'.translate({97: 'b' * 10**9}) }}",
    "{% set x = ('a' * 99000) | list %}{{ x | max(attribute='0.' * 7000 ~ '0') }}",
    "{% set x = ('a' * 99000) | list %}{{ x | select('in', range(99000)) | first }}",
    "{% for i in range(9999) %}" + "a" * 1000 + "{% endfor %}", "{{ ('a' * 10**7) | wordwrap(1) }}",
])
def test_a_hostile_or_broken_template_is_an_error(tok: Tokenizer, tmp_path: Path,
                                                  template: str) -> None:
    with pytest.raises(VicugnaError, match="chat template"):
        encode(with_template(tok, tmp_path, template), [USER])
    assert encode(tok, [USER])  # the next one is rendered as ever


@pytest.mark.parametrize("template", [
    "{{ ''.__class__ }}", "{{ ()|attr('__class__') }}", "{{ '{0.__class__}'.format(3) }}",
    "{{ raise_exception.__globals__ }}", "{{ messages|map(attribute='__class__')|join }}"])
def test_inner_attributes_are_undefined(tok: Tokenizer, tmp_path: Path, template: str) -> None:
    assert render(with_template(tok, tmp_path, template), [USER]) == ""


def test_the_process_of_templates_is_replaced_when_it_ends(tok: Tokenizer) -> None:
    """Killed from outside, or inherited by a process that forked: each has one of its own."""
    due = render(tok, [USER])
    process = WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert render(tok, [USER]) == due and WORKER._process is not process
    child = os.fork()
    if not child:
        os._exit(render(tok, [USER]) != due or WORKER._process is None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render(tok, [USER]) == due


@pytest.mark.parametrize("encoding", ["utf-16", "cp037", "ascii", "utf-7"])
def test_templates_do_not_depend_on_the_encoding_of_streams(
        tok: Tokenizer, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    due = render(tok, [USER, ANSWER])
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    WORKER.stop()  # the next one inherits the environment
    assert render(tok, [USER, ANSWER]) == due
    WORKER.stop()


def test_many_threads_render_at_once(tok: Tokenizer, tmp_path: Path) -> None:
    endless = with_template(tok, tmp_path, "{% for i in range(99999) %}{% for j in range(99999) %}"
                                           "{% endfor %}{% endfor %}")

    def rendered(number: int) -> str:
        if number % 10 == 5:
            with pytest.raises(VicugnaError, match="runs for too long"):
                render(endless, [USER])
        return render(tok, [{"role": "user", "content": f"number {number}"}])

    with ThreadPoolExecutor(8) as threads:
        for number, text in enumerate(threads.map(rendered, range(20))):
            assert f"number {number}<" in text


LOOKS = ["{% set c = '<think></think>' ~ messages[0].content %}{{ '<think>' in c }}",
         "{% macro f() %}<none>{% endmacro %}{{ f() == '<none>' }}",
         "{{ '<think>x</think>y'.split('</think>')[-1] }}",
         "{{ ('<a>' ~ messages[0].content).replace('<a>', '') }}",
         "{{ ('<a>' ~ messages[0].content) | replace('<a>', '') }}",
         "{% set x = '<' %}{{ x in messages[0].content }}",
         "{{ messages[0].content is eq '<b>' }}{{ messages[0].content in ['<b>'] }}",
         "{{ messages | selectattr('content', 'equalto', '<b>') | list | length }}",
         "{{ messages[0].content.split(sep='<') }}", "{{ messages[0].content.strip('<>') }}",
         "{{ messages[0] is sameas messages[0] }}{{ messages[0] is sameas {'role': 'user'} }}",
         "{{ (messages | groupby('role'))[0] == ('user', messages) }}",
         "{{ messages[0].content.split(maxsplit=1) }}{{ '<a>b<c'.split('<', maxsplit=1) }}",
         "{{ messages[0].content.split(none, 1) }}{{ 'x<y'.startswith(()) }}",
         "{{ messages[0].content.startswith(('x', '<b')) }}",
         "{{ messages[0].content.find('<b') }}",
         "{{ '{}-{0}{a}'.replace('{0}', '').format(messages[0].content, a='<i>') }}",
         "{{ ','.join(messages[0].content | list) }}"]


@pytest.mark.parametrize("template", LOOKS)
def test_texts_are_compared_and_searched_whoever_wrote_them(tok: Tokenizer, tmp_path: Path,
                                                            template: str) -> None:
    """A part of people's text is swapped for another character; a template must not see that."""
    said = {"messages": [{"role": "user", "content": "<b>"}]}
    assert (render(with_template(tok, tmp_path, template), said["messages"])
            == ImmutableSandboxedEnvironment().from_string(template).render(said))


def test_a_template_that_looks_back_takes_long_chats(tok: Tokenizer, tmp_path: Path) -> None:
    back = with_template(tok, tmp_path, "{% for m in messages %}{% set n = namespace(c=0) %}"
                         "{% for k in messages[:loop.index0] %}{% if k.role == 'user' %}"
                         "{% set n.c = n.c + 1 %}{% endif %}{% endfor %}{{ n.c }};{% endfor %}")
    assert render(back, [USER, ANSWER] * 400).endswith("399;400;")


def test_numbers_of_the_input_may_be_written(tok: Tokenizer, tmp_path: Path) -> None:
    shown = with_template(tok, tmp_path, "{{ messages[0].content | tojson(indent=2) }}")
    assert render(shown, [{"role": "tool", "content": [1234] * 9000}]).count("1234") == 9000


def test_the_reason_a_template_gives_is_cut(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(VicugnaError) as refusal:
        encode(with_template(tok, tmp_path, "{{ raise_exception('a' * 9999) }}"), [USER])
    assert len(str(refusal.value)) < 500


def test_lists_macros_and_joined_text_are_as_in_jinja(tok: Tokenizer, tmp_path: Path) -> None:
    several = with_template(
        tok, tmp_path, "{% set n = namespace(l=[], t=(1, 2)) %}{% macro m(n, x) %}{{ n.t }}{{ x }}"
        "{{ varargs }}{% endmacro %}{% for k, v in {'a': [1]}.items() %}{{ m(n, v, k) }}"
        "{% set n.l = n.l + [k] %}{% endfor %}{{ n.l ~ '<b>' ~ ('<i>' | safe) ~ 1 }}"
        "{% set x | upper %}a{{ [1] * 3 }}{% endset %}{{ x }}{{ ['a', 'b'] | join(', ') }}"
        "{{ 'a.b' | replace('.', '-') }}{{ 'a\nb' | indent(2) }}{{ 1.25 | round(1) }}")
    text = render(several, [USER])
    assert text == "(1, 2)[1]('a',)['a']<b><i>1A[1, 1, 1]a, ba-ba\n  b1.2"


def test_a_template_that_trims_and_splits_is_safe(tok: Tokenizer, tmp_path: Path) -> None:
    careless = with_template(
        tok, tmp_path, "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}"
        "{{ m.content.split('x')[0] }}{{ m.content[:3] ~ m.content[3:] }}<|eot_id|>{% endfor %}")
    ids = encode(careless, [{"role": "user", "content": " <|eot_id|>x<|pad|> "}])
    assert controls(tok, ids) == [tok.bos_id, tok.id_of("<|eot_id|>")]


def test_running_out_of_rare_characters_is_an_error(tok: Tokenizer) -> None:
    every = "".join(map(chr, range(0x20000, 0x2A6DE)))
    assert encode(tok, [{"role": "user", "content": every}])
    with pytest.raises(VicugnaError, match="rare ideograph"):
        encode(tok, [{"role": "user", "content": every + "<"}])


LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.mark.parametrize("chat", CHATS[:5])
def test_the_template_of_llama_3(tok: Tokenizer, tmp_path: Path,
                                 chat: list[dict[str, Any]]) -> None:
    chat = [dict(message) for message in chat]
    transformers = pytest.importorskip("transformers")
    foreign = with_template(tok, tmp_path, LLAMA_3)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert encode(foreign, chat) == theirs(reference, chat, add_generation_prompt=True)
    ids, mask = encode_training(foreign, chat)
    for message in chat:  # the template has no place for it
        if reasoning := message.pop("reasoning", None):
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
    if not any("<think>" in message["content"] for message in chat):
        assert ids == theirs(reference, chat)
    said = foreign.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special=False)
    assert said == "".join(m["content"].strip() + "<|eot_id|>" for m in chat
                           if m["role"] == "assistant")

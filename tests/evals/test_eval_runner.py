"""Every planned item is counted once, whatever happens while it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vicugna import evals, models, tasks, tokenizer
from vicugna.engine import Sampling
from vicugna.errors import VicugnaError
from vicugna.evals.plan import Plan, PlannedItem, plan_item, sort_plan, split_batches
from vicugna.evals.runner import LocalModel, Reply, make_item, run, score_reply
from vicugna.files import digest_of
from vicugna.model import Model
from vicugna.tasks import Difficulty, Item, split_seed

TOKENIZER = tokenizer.train(["right wrong truncated no reply bad score half nan " * 9], 300)
DAY = date(2026, 1, 1)


class Echo:
    """A task whose question names its outcome."""

    name = "echo"
    outcome = ("right", "wrong", "truncated", "no reply", "bad score", "half", "right", "nan")

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        outcome = self.outcome[seed % len(self.outcome)]
        messages = [{"role": "user", "content": f"{outcome} " + "word " * (seed % 5)}]
        return Item(self.name, seed, difficulty, messages, "right",
                    {"role": "assistant", "content": "right"}, {"cluster": f"c{seed % 3}"})

    def score(self, item: Item, response: str) -> float:
        if response == "bad score":
            raise ZeroDivisionError("no such luck")
        return {"right": 1.0, "half": 0.5, "nan": float("nan")}.get(response, 0.0)


class Scripted:
    """Answers with the question's first words; interrupted before call number `dies`."""

    digest, precision, platform = "d" * 64, "float32", "here"

    def __init__(self, dies: int = -1) -> None:
        self.calls, self.dies = 0, dies

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        if self.calls == self.dies:
            raise KeyboardInterrupt
        self.calls += 1
        replies = []
        for messages in conversations:
            text = messages[-1]["content"].replace("word", "").strip()
            error = "refused" if text == "no reply" else None
            reason = "length" if text == "truncated" else "stop"
            # "truncated" would be right by its text: it still may not count.
            text = "right" if text == "truncated" else text
            replies.append(Reply(text, None, 3, "" if error else reason, digest_of(text), error))
        return replies


ECHO = {"echo": Echo()}


def plan_of(n: int) -> Plan:
    return sort_plan((plan_item("g", Echo().item(seed, Difficulty()), 8, TOKENIZER, DAY)
                      for seed in range(n)), DAY)


def go(folder: Path, n: int = 40, dies: int = -1, **more: Any) -> evals.Results:
    return run(Scripted(dies), plan_of(n), folder, batch_size=4, own_tasks=ECHO, **more)


def test_every_planned_item_ends_once_and_counts(tmp_path: Path) -> None:
    seen = []
    results = go(tmp_path, progress=lambda done, total: seen.append((done, total)))
    (row,) = results.rows
    assert (row.n, row.right, row.wrong, row.truncated, row.error) == (40, 10, 10, 5, 15)
    assert row.accuracy == 0.25 and row.if_errors_right == 0.625 and row.method == "clustered"
    assert row.low < 0.25 < row.high
    assert seen[0] == (0, 40) and seen[-1] == (40, 40)
    records = evals.read_records(tmp_path / "items.jsonl")
    assert [record["id"] for record in records] == [item.id for item in plan_of(40).items]
    errors = {record["error"] for record in records if record["outcome"] == "error"}
    assert errors == {"refused", "ZeroDivisionError: no such luck",
                      "ValueError: the score nan is not between 0 and 1"}
    assert all(record["score"] is None for record in records
               if record["outcome"] in ("error", "truncated"))
    again, _ = evals.read_results(tmp_path)
    assert again == results and again.digest == results.digest


def test_an_item_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    class Broken(Echo):
        def item(self, seed: int, difficulty: Difficulty) -> Item:
            if seed == 1:
                raise IndexError("out of needles")
            return super().item(seed, difficulty)

    results = run(Scripted(), plan_of(8), tmp_path, own_tasks={"echo": Broken()})
    assert results.rows[0].n == 8 and results.rows[0].error == 4
    with pytest.raises(VicugnaError, match="no longer gives the planned item"):
        changed = Plan([replace(plan_of(8).items[0], seed=3)], DAY)
        run(Scripted(), changed, tmp_path / "b", own_tasks=ECHO)


def test_a_failing_machine_is_no_outcome(tmp_path: Path) -> None:
    class Full(Echo):
        def score(self, item: Item, response: str) -> float:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(Scripted(), plan_of(8), tmp_path, own_tasks={"echo": Full()})
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(VicugnaError, match="not complete"):
        evals.read_results(tmp_path)


@given(dies=st.integers(0, 9), torn=st.integers(0, 4000))
@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_resumed_ends_in_the_same_bytes(tmp_path_factory: pytest.TempPathFactory,
                                                   dies: int, torn: int) -> None:
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    digest = go(whole).digest
    with pytest.raises(KeyboardInterrupt):
        go(folder, dies=dies)
    items = folder / "items.jsonl"
    if items.exists():
        items.write_bytes(items.read_bytes()[:-torn or None])
    assert go(folder).digest == digest
    for name in ("items.jsonl", "results.json", "plan.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert go(folder, dies=0).digest == digest  # complete: nothing is asked again


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    other = Scripted()
    other.digest = "e" * 64
    with pytest.raises(VicugnaError, match="another model digest"):
        run(other, plan_of(40), tmp_path, batch_size=4, own_tasks=ECHO)
    with pytest.raises(VicugnaError, match="another plan digest"):
        go(tmp_path, n=39)
    with pytest.raises(VicugnaError, match="another sampling"):
        go(tmp_path, sampling=Sampling(temperature=0.5))
    with pytest.raises(VicugnaError, match="another batch size"):
        run(Scripted(), plan_of(40), tmp_path, batch_size=5, own_tasks=ECHO)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(VicugnaError):
        go(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("old, new", [
    ('"right": 10', '"right": 11'), ('"accuracy": 0.25', '"accuracy": 0.35'),
    ('"n": 40', '"n": 30'), ('"model_digest": "d', '"model_digest": "f')])
def test_an_edited_table_does_not_follow(tmp_path: Path, old: str, new: str) -> None:
    go(tmp_path)
    edit(tmp_path / "results.json", old, new)
    with pytest.raises(VicugnaError):
        evals.read_results(tmp_path)


@pytest.mark.parametrize("change", ["drop", "twice", "flip", "spaces", "swap", "binary"])
def test_edited_items_do_not_count(tmp_path: Path, change: str) -> None:
    go(tmp_path)
    path = tmp_path / "items.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join({
        "drop": lines[1:], "twice": [lines[0], *lines],
        "flip": [lines[0].replace(b'"outcome":"', b'"outcome":"un'), *lines[1:]],
        "spaces": [lines[0].replace(b":", b": ", 1), *lines[1:]],
        "swap": [lines[1], lines[0], *lines[2:]], "binary": [b"\xff\n", *lines[1:]]}[change]))
    with pytest.raises(VicugnaError):
        evals.read_results(tmp_path)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9),
       st.integers(1, 200))
def test_batches_hold_every_item_once_and_keep_to_the_limits(
        lengths: list[int], size: int, tokens: int) -> None:
    one = plan_of(1).items[0]
    plan = [replace(one, prompt_tokens=length, max_new_tokens=1) for length in lengths]
    batches = split_batches(plan, size, tokens)
    assert [item for batch in batches for item in batch] == plan
    for batch in batches:
        longest = max(item.prompt_tokens + 1 for item in batch)
        assert 1 <= len(batch) <= size and (len(batch) == 1 or longest * len(batch) <= tokens)


def network(vocab_size: int) -> Any:
    made = models.build({
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 600})
    models.initialise(made, 0)
    return made.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    words = tokenizer.train(["The code of indigo barrel is 8715. Snow fell. Birds sang."] * 3, 280)
    return Model(network(words.vocab_size), words)


SPECS: list[dict[str, Any]] = [
    {"group": "needle", "task": "retrieval.single", "n": 6, "length_tokens": 500,
     "max_new_tokens": 4},
    {"group": "needle", "task": "retrieval.single", "n": 3, "length_tokens": 900,
     "max_new_tokens": 4},
    {"group": "sums", "task": "reasoning.steps", "n": 5, "difficulty": {"depth": 2},
     "max_new_tokens": 5}]


def test_a_plan_is_fitted_sorted_and_the_same_each_time(model: Model) -> None:
    assert model.tokenizer
    plan = evals.build_plan(SPECS, model.tokenizer, DAY)
    assert plan == evals.build_plan(SPECS, model.tokenizer, DAY)
    lengths = [item.prompt_tokens for item in plan.items]
    assert lengths == sorted(lengths)
    for item in plan.items:
        if item.length_tokens:
            assert 0.95 * item.length_tokens <= item.prompt_tokens <= item.length_tokens
    assert {item.row[2] for item in plan.items} == {"500 tokens", "900 tokens", "depth 2"}
    seeds = sorted(item.seed for item in plan.items if item.group == "sums")
    assert seeds == [split_seed("test", k) for k in range(5)]
    assert evals.PlannedItem.from_dict(json.loads(json.dumps(
        {**vars(plan.items[0]), "difficulty": vars(plan.items[0].difficulty)}))) == plan.items[0]


@pytest.mark.parametrize("change", [
    {"n": 0}, {"n": "many"}, {"m": 3}, {"split": "exam"}, {"task": "retrieval.singel"},
    {"difficulty": {"dept": 2}}, {"difficulty": {"depth": 0}}, {"max_new_tokens": 0},
    {"length_tokens": 3}])
def test_a_wrong_spec_is_named(model: Model, change: dict[str, Any]) -> None:
    assert model.tokenizer
    with pytest.raises(VicugnaError):
        evals.build_plan([{**SPECS[0], **change}], model.tokenizer, DAY)
    with pytest.raises(VicugnaError, match="asked twice"):
        evals.build_plan([SPECS[0], SPECS[0]], model.tokenizer, DAY)


def test_a_real_model_too_long_prompts_are_errors(model: Model,
                                                  tmp_path: Path) -> None:
    assert model.tokenizer
    plan = evals.build_plan(SPECS, model.tokenizer, DAY)
    results = run(model, plan, tmp_path / "a", batch_size=4)
    rows = {row.difficulty: row for row in results.rows}
    assert rows["900 tokens"].error == rows["900 tokens"].n == 3
    assert rows["500 tokens"].truncated + rows["500 tokens"].wrong == 6
    assert results.model_digest == model.digest and results.precision == "float32"
    records = evals.read_records(tmp_path / "a" / "items.jsonl")
    long = next(record for record in records if record["outcome"] == "error")
    assert "the context 600" in long["error"] and long["prompt_digest"]
    assert run(model, plan, tmp_path / "b", batch_size=4).digest == results.digest


def test_one_failing_prompt_does_not_take_its_batch_with_it(
        model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evals.runner.engine.generate

    def picky(network: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any) -> Any:
        if any(len(prompt) > 40 for prompt in prompts):
            raise RuntimeError("no")
        return real(network, tokenizer, prompts, *rest)

    monkeypatch.setattr("vicugna.evals.runner.engine.generate", picky)
    short, long = ([{"role": "user", "content": "a " * k}] for k in (2, 90))
    replies = LocalModel(model, DAY).answer([short, long, short], [Sampling(max_new_tokens=2)] * 3)
    assert [reply.error for reply in replies] == [None, "RuntimeError: no", None]
    assert replies[0] == replies[2]


REFUSING = """{%- for message in messages -%}
{%- if message.role == "system" -%}{{ raise_exception("no system messages") }}{%- endif -%}
{%- if not loop.first and message.role == loop.previtem.role -%}
{{ raise_exception("roles must alternate") }}{%- endif -%}
{{ message.role }}: {{ message.content }}
{% endfor %}{{ strftime_now("%d %B %Y") }}"""


@pytest.fixture
def strict_model(model: Model, tmp_path: Path) -> Model:
    """The model with a template that refuses some chats and writes the date."""
    assert model.tokenizer
    model.tokenizer.save(tmp_path / "words")
    (tmp_path / "words" / "chat_template.jinja").write_text(REFUSING)
    return Model(model.network, tokenizer.Tokenizer(tmp_path / "words"))


def test_what_the_template_refuses_is_an_error_of_its_line(
        strict_model: Model, tmp_path: Path) -> None:
    assert strict_model.tokenizer
    user = {"role": "user", "content": "Snow?"}
    chats = [[user], [{"role": "system", "content": "Be brief."}, user], [user, user],
             [{"role": "user", "content": "Snow " * 600}]]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(
        json.dumps({"messages": chat, "answers": ["yes"]}) for chat in chats))
    plan, task = evals.plan_items(tmp_path / "mine.jsonl", strict_model.tokenizer, DAY, 2)
    results = run(strict_model, plan, tmp_path / "r", own_tasks={task.name: task})
    assert (results.rows[0].n, results.rows[0].error) == (4, 3)
    records = evals.read_records(tmp_path / "r" / "items.jsonl")
    errors = sorted(record["error"] for record in records if record["outcome"] == "error")
    assert [error.partition(": ")[0] for error in errors] == ["line 3", "line 5", "line 7"]
    assert "no system messages" in errors[0] and "must alternate" in errors[1]
    assert "the context 600" in errors[2]


def test_built_in_items_that_the_template_refuses_are_errors(
        strict_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
        ) -> None:
    class Mixed(Echo):
        def item(self, seed: int, difficulty: Difficulty) -> Item:
            made = super().item(seed, difficulty)
            system = {"role": "system", "content": "Think."}
            return replace(made, messages=[system, *made.messages]) if seed % 2 else made

    assert strict_model.tokenizer
    monkeypatch.setitem(tasks.TASKS, "echo", Mixed())  # type: ignore[arg-type]
    spec = {"group": "g", "task": "echo", "n": 6, "max_new_tokens": 2}
    plan = evals.build_plan([spec], strict_model.tokenizer, DAY)
    row = run(strict_model, plan, tmp_path / "r").rows[0]
    assert row.n == 6 and row.error == 3


def test_the_date_is_the_plans_whatever_the_day(
        strict_model: Model, tmp_path: Path) -> None:
    assert strict_model.tokenizer
    plans = [evals.build_plan([SPECS[2]], strict_model.tokenizer, day)
             for day in (DAY, DAY, date(2030, 12, 31))]
    digests = [[record["prompt_digest"] for record in evals.read_records(
        tmp_path / str(k) / "items.jsonl")] for k, plan in enumerate(plans)
        if run(strict_model, plan, tmp_path / str(k))]
    assert digests[0] == digests[1] and not set(digests[0]) & set(digests[2])
    assert evals.read_results(tmp_path / "2")[0].date == "2030-12-31"
    assert json.loads((tmp_path / "0" / "plan.json").read_text())["date"] == "2026-01-01"
    with pytest.raises(VicugnaError, match="another"):
        run(strict_model, plans[2], tmp_path / "0")


def test_a_model_without_a_chat_template_is_refused_as_a_whole(
        model: Model, tmp_path: Path) -> None:
    assert model.tokenizer
    model.tokenizer.save(tmp_path / "words")
    (tmp_path / "words" / "chat_template.jinja").unlink()
    with pytest.raises(VicugnaError, match="no chat template"):
        LocalModel(Model(model.network, tokenizer.Tokenizer(tmp_path / "words")), DAY)


def test_results_of_an_older_format_say_so(tmp_path: Path) -> None:
    go(tmp_path)
    edit(tmp_path / "results.json", '"format": 2', '"format": 1')
    with pytest.raises(VicugnaError, match="format 1, not 2"):
        evals.read_results(tmp_path)


def test_tokens_without_an_embedding_are_errors(model: Model, tmp_path: Path) -> None:
    assert model.tokenizer
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "Snow?", "answers": ["yes"]}))
    plan, task = evals.plan_items(tmp_path / "mine.jsonl", model.tokenizer, DAY, 2)
    small = Model(network(200), model.tokenizer)
    results = run(small, plan, tmp_path / "r", own_tasks={task.name: task})
    assert (results.rows[0].n, results.rows[0].error) == (1, 1)
    (record,) = evals.read_records(tmp_path / "r" / "items.jsonl")
    assert record["error"].startswith("line 1: ") and "the vocabulary has 200" in record["error"]


def test_tasks_of_reasoning_gym_are_generated_and_scored() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")
    item = tasks.get("reasoning_gym.leg_counting").item(0, Difficulty())
    planned = PlannedItem("legs", item.task, 0, Difficulty(), 8,
                          question_digest=digest_of(item.messages))
    assert make_item(planned) == item
    assert score_reply(item, Reply(item.answer, None, 1, "stop"))["outcome"] == "right"
    assert tasks.is_builtin(item.task) and not tasks.is_builtin("items")

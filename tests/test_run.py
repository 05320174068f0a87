"""Runs: killed, interrupted and failing anywhere, they go on and end in the same bytes."""

from __future__ import annotations

import datetime
import errno
import inspect
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import RECIPE, arguments, made_by, run_to_its_end, start

import vicugna
from vicugna import chat, models, run, tokenizer
from vicugna.distributed import Ranks
from vicugna.errors import Refused, VicugnaError
from vicugna.files import owned, read_json
from vicugna.ledger import Ledger
from vicugna.model import Model
from vicugna.release import verify
from vicugna.training import cost, supervised
from vicugna.training.recipe import Recipe, read

KILLS = int(os.environ.get("VICUGNA_KILLS", "2"))  # more take minutes


def begun(process: subprocess.Popen[str]) -> None:
    """Wait until the process has imported all and says its first word."""
    assert process.stderr
    assert process.stderr.readline(), process.communicate()


@pytest.mark.timeout(1800)  # VICUGNA_KILLS may ask for many
def test_killed_anywhere_it_ends_in_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    for _ in range(KILLS):
        process = start(*arguments(folder))
        begun(process)
        time.sleep(random.uniform(0, 10 / KILLS))
        process.kill()
        process.communicate()
    ended = run_to_its_end(folder)
    assert ended.code == 0, ended.err
    assert made_by(folder) == made_by(tiny)
    assert not list(folder.rglob("*.old*")) and not list(folder.rglob("*.tmp"))
    assert all(check.ok for check in verify(folder / "06-release" / "release", 4))
    assert Ledger(folder.parent / "ledger.sqlite").check() is None


def test_interrupted_it_says_so(tmp_path: Path) -> None:
    number = random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    folder = tmp_path / "runs" / "tiny"
    process = start(*arguments(folder))
    begun(process)
    time.sleep(random.uniform(0, 3))
    process.send_signal(number)
    _, err = process.communicate()
    if process.returncode != 0:  # it may have been done by then
        assert process.returncode == 130 and "Traceback" not in err
        assert err.endswith("vicugna: interrupted. A run resumes where it stopped: repeat the "
                            "command\n")
        attempts = Ledger(folder.parent / "ledger.sqlite").attempts()
        assert {a.outcome for a in attempts} <= {"done", "interrupted"}


class Small:
    """A run of four steps without any other process, to stop and to change."""

    def __init__(self, folder: Path, *more: dict[str, Any]) -> None:
        (folder / "text.txt").write_text("The old teacher bought 12 pillows. " * 200)
        self.folder = folder / "runs" / "r"
        source = {"source": str(folder / "text.txt")}
        self.values: dict[str, Any] = {
            "model": {"depth": 1, "width": 16, "heads": 2, "context": 256, "window": 8},
            "data": {"sources": [source]}}
        self.stages: list[dict[str, Any]] = [
            {"kind": "tokenizer", "vocab_size": 300, "bytes_per_source": 5000},
            {"kind": "pretrain", "steps": 4, "rows": 2, "sequence_length": 32,
             "precision": "fp32", "sources": [source], "checkpoint_every": 1,
             "validation_rows": 0}, *more]

    @property
    def recipe(self) -> dict[str, Any]:
        return {**self.values, "stages": self.stages}

    def __call__(self, only: str | None = None) -> run.Run:
        return run.run_recipe(Recipe.model_validate(self.recipe), self.folder, Ranks(), only)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder.parent / "ledger.sqlite")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(cost, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(run, "write_report", lambda folder, ledger: None)
    return Small(tmp_path)


EVAL = {"kind": "eval",
        "groups": [{"group": "g", "task": "reasoning.steps", "n": 3, "max_new_tokens": 3}]}
SFT = {"kind": "sft", "steps": 2, "rows": 2, "sequence_length": 128, "precision": "fp32",
       "sources": ["task:reasoning.steps"], "checkpoint_every": 1, "validation_rows": 0}
RELEASE = {"kind": "release"}


def test_every_storage_call_may_be_the_last(small: Small, monkeypatch: pytest.MonkeyPatch,
                                            tmp_path: Path) -> None:
    """The process dies at the first, then at the second, ... call that changes the disk."""
    small.stages.append(EVAL)
    calm = Small(tmp_path, EVAL)
    calm.folder = tmp_path / "calm" / "r"
    calm()
    real = {name: getattr(os, name) for name in ("replace", "fsync", "rename", "truncate")}
    deaths = left = 0

    def dying(name: str) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise SystemExit("killed")
            return real[name](*arguments, **how)
        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, dying(name))
        for tried in range(0, 1000, 5):
            left = tried
            try:
                small()
                break
            except SystemExit:
                deaths += 1
    assert deaths > 5
    for stage in ("01-tokenizer", "02-pretrain"):
        for path in (calm.folder / stage / "checkpoint").iterdir():
            assert path.read_bytes() == (small.folder / stage / "checkpoint" / path.name
                                         ).read_bytes()
    name = "03-eval/pretrain/results.json"
    assert (calm.folder / name).read_bytes() == (small.folder / name).read_bytes()


def test_what_is_done_is_not_done_again(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small()
    before = read_json(small.folder / "02-pretrain" / "stage.json")
    monkeypatch.setattr(supervised, "batches", None)  # would raise
    small()
    assert read_json(small.folder / "02-pretrain" / "stage.json") == before
    assert len(small.ledger.attempts()) == 2


def test_an_edited_recipe_redoes_what_it_changes(small: Small) -> None:
    small()
    small.stages[1]["steps"] = 5
    small()
    assert (small.folder / "02-pretrain.old-1" / "stage.json").exists()
    assert not (small.folder / "01-tokenizer.old-1").exists()
    text = Path(small.values["data"]["sources"][0]["source"])
    text.write_text(text.read_text() + "Snow fell. " * 50)  # data is an input, too
    small()
    assert (small.folder / "01-tokenizer.old-1").exists()
    assert (small.folder / "02-pretrain.old-2").exists()


def frozen(small: Small) -> dict[str, bytes]:
    """Every finished stage's stage.json, by the stage's name."""
    return {path.parent.name.split("-", 1)[1]: path.read_bytes()
            for path in small.folder.glob("??-*/stage.json") if ".old" not in path.parent.name}


def folders(small: Small) -> list[str]:
    return sorted(path.name for path in small.folder.glob("??-*"))


def test_a_stage_put_in_between_repeats_no_other(small: Small, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    small.stages.append(SFT)
    small()
    before = frozen(small)
    small.stages.insert(2, {**EVAL, "name": "early"})
    small.stages.append({**EVAL, "compare": ["pretrain"]})
    monkeypatch.setattr(supervised, "batches", None)  # would raise
    monkeypatch.setattr(run, "train_tokenizer", None)
    small()
    assert folders(small) == ["01-tokenizer", "02-pretrain", "03-early", "04-sft", "05-eval"]
    assert before.items() < frozen(small).items()
    assert {path.parent.name for path in small.folder.glob("0*/*/results.json")} == {
        "pretrain", "sft"}
    del small.stages[2]
    small()
    assert folders(small) == ["01-tokenizer", "02-pretrain", "03-early", "03-sft", "04-eval"]
    small.stages.insert(2, {**EVAL, "name": "early"})  # its folder was left, and is found again
    count = len(small.ledger.attempts())
    small()
    assert folders(small) == ["01-tokenizer", "02-pretrain", "03-early", "04-sft", "05-eval"]
    assert len(small.ledger.attempts()) == count


def test_killed_between_two_renamings_it_goes_on(small: Small, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    small.stages += [SFT, EVAL]
    small()
    before = frozen(small)
    small.stages.insert(1, {**SFT, "name": "zero"})
    small.stages[1], small.stages[2] = small.stages[2], small.stages[1]
    real, left = Path.rename, 1

    def rename(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit("killed")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(SystemExit):
            small()
    assert len(folders(small)) == 4
    small()
    assert folders(small) == ["01-tokenizer", "02-pretrain", "03-zero", "04-sft", "04-sft.old-1",
                              "05-eval", "05-eval.old-1"]  # their model is another one now
    assert {name: frozen(small)[name] for name in ("tokenizer", "pretrain")} == {
        name: before[name] for name in ("tokenizer", "pretrain")}


def test_work_is_found_again_whatever_its_name_has_become(small: Small,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    small.stages.append(SFT)
    small()
    before = frozen(small)
    small.stages.insert(2, {**SFT, "name": "more", "steps": 1})  # changes what sft starts from
    small()
    assert (small.folder / "04-sft.old-1").exists()
    del small.stages[2]
    small.stages[1]["name"], small.stages[2] = "base", {**SFT, "name": "chat"}
    monkeypatch.setattr(supervised, "batches", None)  # would raise
    small()
    assert {"01-tokenizer", "02-base", "03-chat"} < {*folders(small)}
    after = frozen(small)
    assert (after["base"], after["chat"]) == (before["pretrain"], before["sft"])


def test_a_name_that_ends_in_another_name(small: Small) -> None:
    small.stages += [{**SFT, "name": "more-sft"}, SFT]
    small()
    small.stages.insert(1, small.stages.pop())  # which changes what both start from
    small.stages[1], small.stages[2] = small.stages[2], small.stages[1]
    small()
    assert [name for name in folders(small) if "old" not in name] == [
        "01-tokenizer", "02-pretrain", "03-sft", "04-more-sft"]


def test_a_kind_twice_sees_other_data_and_a_later_one_repeats_nothing(
        small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[str, int]] = []
    real = run.training.train_stage

    def train_stage(model: Any, spec: Any, seed: int, *more: Any) -> Any:
        seeds.append((spec.name, seed))
        return real(model, spec, seed, *more)

    monkeypatch.setattr(run.training, "train_stage", train_stage)
    rl = {"kind": "rl", "steps": 1, "prompts": 2, "group": 2, "max_new_tokens": 4,
          "precision": "fp32", "tasks": ["task:reasoning.steps"]}
    small.stages += [SFT, rl, {**SFT, "name": "sft2"}]
    small()
    small.stages.append({**rl, "name": "rl2"})
    done = small()
    assert [name for name, _ in seeds] == ["pretrain", "sft", "rl", "sft2", "rl2"]
    used = dict(seeds)
    assert used["pretrain"] == used["sft"] == used["rl"] == 0
    assert used["sft2"] != 0 != used["rl2"]
    assert [attempt.parents for attempt in small.ledger.attempts()][-2:] == [
        [done.output("rl")], [done.output("sft2")]]


def test_releases_in_the_middle_and_at_the_end(small: Small) -> None:
    small.stages += [{**EVAL, "name": "first"},
                     {**RELEASE, "name": "early", "title": "Early", "purpose": "product"},
                     SFT, EVAL, {**RELEASE, "title": "Late"}]
    done = small()
    for name, title, model in (("early", "Early", "pretrain"), ("release", "Late", "sft")):
        folder = done.path(name) / "release"
        assert (folder / "README.md").read_text().count(f"# {title}\n") == 1
        assert all(check.ok for check in verify(folder, 2))
        assert read_json(folder / "manifest.json")["model_digest"] == done.output(model)
    purposes = {(attempt.kind, attempt.result["digest"]): attempt.purpose
                for attempt in small.ledger.attempts()}
    assert {key for key, purpose in purposes.items() if purpose == "product"} == {
        ("tokenizer", done.output("tokenizer")), ("pretrain", done.output("pretrain")),
        ("eval", read_json(done.path("first") / "pretrain" / "results.json")["results_digest"]),
        ("release", done.output("early"))}
    assert len(purposes) == 7


def test_a_release_that_is_refused_is_entered_as_refused(small: Small) -> None:
    small.stages += [EVAL, RELEASE]
    for name in ("tokenizer", "pretrain", "eval"):
        small(name)
    results = small.folder / "03-eval" / "pretrain" / "results.json"
    results.write_text(results.read_text().replace('"wrong": ', '"wrong": 1'))
    with pytest.raises(Refused):
        small("release")
    last = small.ledger.attempts()[-1]
    assert (last.kind, last.outcome) == ("release", "refused") and last.result["error"]
    assert not list(small.folder.rglob("manifest.json"))


def test_a_run_that_was_moved_is_the_same_run(small: Small, tmp_path: Path) -> None:
    """Neither its place nor its name is an input, and no release tells where it was made."""
    small.stages += [EVAL, RELEASE]
    small()
    before = frozen(small)
    moved = tmp_path / "elsewhere"
    small.folder.parent.rename(moved)
    (moved / "r").rename(moved / "renamed")
    small.folder = moved / "renamed"
    small()
    assert frozen(small) == before and len(small.ledger.attempts()) == 4
    release = small.folder / "04-release" / "release"
    assert all(check.ok for check in verify(release.rename(tmp_path / "any name"), 2))
    for path in (tmp_path / "any name").rglob("*"):
        if path.is_file() and path.name not in ("recipe.yaml", "README.md"):  # they name sources
            assert str(tmp_path).encode() not in path.read_bytes()


def test_the_stored_recipe_makes_the_same_run(small: Small, tmp_path: Path) -> None:
    first = small()
    recipe = read(small.folder / "recipe.yaml")
    assert recipe.digest == first.recipe.digest
    again = run.run_recipe(recipe, tmp_path / "again" / "r", Ranks())
    assert again.record("pretrain")["output"] == first.record("pretrain")["output"]  # type: ignore[index]


def test_a_changed_checkpoint_is_noticed(small: Small) -> None:
    small()
    path = small.folder / "02-pretrain" / "checkpoint" / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    small.stages.append(EVAL)
    with pytest.raises(VicugnaError, match="not the one this stage made"):
        small()


def test_another_process_in_the_folder(small: Small) -> None:
    with owned(small.folder), pytest.raises(VicugnaError, match="another process is using"):
        small()


@pytest.mark.parametrize("text", ['{"format": 0}', "[]", "{"])
def test_an_older_run(text: str, small: Small) -> None:
    small.folder.mkdir(parents=True)
    (small.folder / "run.json").write_text(text)
    with pytest.raises(VicugnaError, match=r"another folder|Correct the file"):
        small()
    assert sorted(p.name for p in small.folder.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("when", [0, 2, 9, 14, 20])
def test_a_disk_that_fails(code: int, when: int, small: Small, monkeypatch: pytest.MonkeyPatch
                           ) -> None:
    """Full, or read-only: said in one line, nothing half-written, and the run goes on later."""
    left, real = when, os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(VicugnaError, match=r"disk is full|no permission") as error:
            small()
        assert str(small.folder) in error.value.where
    assert not [p for p in small.folder.rglob("*") if p.name.endswith((".tmp", ".old"))]
    done = small()
    assert done.record("pretrain")
    assert {a.outcome for a in small.ledger.attempts()} <= {"done", "failed"}


def test_a_state_that_cannot_be_written(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up inside PyTorch's writer, which wraps errors in its own."""
    import torch.distributed.checkpoint.filesystem as filesystem

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filesystem, "_write_item", full)
    with pytest.raises(VicugnaError, match="the disk is full"):
        small()


def test_memory_that_runs_out(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.stages[1]["rows"] = 100_000_000
    with pytest.raises(VicugnaError, match=r"micro_rows to \d+, which fits"):
        small()
    small.stages[1]["rows"] = 2
    small.values["model"] = {"depth": 500}
    with pytest.raises(VicugnaError, match=r"million parameters.*Lower model.depth"):
        small()

    def greedy(*arguments: Any, **how: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(supervised, "batches", greedy)
    small.values["model"] = {"depth": 1, "width": 16, "heads": 2, "context": 256}
    with pytest.raises(VicugnaError, match="memory ran out"):
        small()
    assert small.ledger.attempts()[-1].outcome == "failed"


def test_own_chats_tune_a_llama_made_by_transformers(small: Small, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe with sft and eval only, from a Hugging Face folder, on the user's own lines."""
    transformers = pytest.importorskip("transformers")
    words = tokenizer.train(["Was ist das? The code is 12. Yes."] * 3, 300)
    config = transformers.LlamaConfig(
        vocab_size=words.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    words.save(tmp_path / "llama")
    sft = {**small.stages[1], "kind": "sft", "sources": own_chats(tmp_path / "mine.jsonl"),
           "sequence_length": 64}
    del small.values["data"]  # the checkpoint has a tokenizer, and no stage names the corpus
    small.values["model"], small.stages = {"start": str(tmp_path / "llama")}, [sft, EVAL]
    loads, load = list[str](), vicugna.load

    def counted(path: Any, **how: Any) -> Model:
        loads.extend([how["device"]] if str(path) == str(tmp_path / "llama") else [])
        return load(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(vicugna, "load", counted)
        done = small()
        assert loads == ["meta"]  # read once, while the network is filled
    tuned = vicugna.load(done.path("sft") / "checkpoint")
    assert tuned.config.to_dict()["model_type"] == "llama"
    assert tuned.tokenizer and tuned.tokenizer.digest == words.digest
    started = vicugna.load(tmp_path / "llama")
    assert tuned.digest != started.digest
    assert started.digest in small.ledger.attempts()[0].parents
    hers = transformers.AutoModelForCausalLM.from_pretrained(done.path("sft") / "checkpoint")
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(hers(tokens).logits, tuned.logits(tokens), atol=1e-5, rtol=1e-5)
    assert "02-eval" in {p.name for p in small.folder.iterdir()}


DATED = (Path(__file__).parent / "tokenizer" / "templates" / "llama3.jinja").read_text()


def own_chats(path: Path) -> list[str]:
    lines = [{"messages": [{"role": "user", "content": f"Code {n}?"},
                           {"role": "assistant", "content": str(n)}]} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return [str(path)]


def a_checkpoint(folder: Path, template: str) -> None:
    """A tiny llama whose replies end early, with a chat template."""
    words = tokenizer.train(["Today Date: 26 Jul 2024 The code is 12. Dogs bark."] * 3, 300)
    network = models.build({
        "model_type": "llama", "vocab_size": words.vocab_size, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 1024, "initializer_range": 0.5})
    models.initialise(network, 0)
    Model(network, words, {"eos_token_id": list(range(0, 300, 2))}).save(folder)
    (folder / "chat_template.jinja").write_text(template)


def test_a_template_that_writes_the_date(small: Small, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, scores and release are the same on every day; only the recipe's date counts."""
    class Clock(datetime.datetime):
        today_is = (2026, 11, 28)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(*cls.today_is)

    monkeypatch.setattr("vicugna.chat.sandbox.datetime", Clock)
    a_checkpoint(tmp_path / "start", DATED)
    small.values = {"model": {"start": str(tmp_path / "start")}}
    rl = {"kind": "rl", "steps": 1, "prompts": 2, "group": 2, "max_new_tokens": 4,
          "precision": "fp32", "tasks": ["task:reasoning.steps"]}
    mine = own_chats(tmp_path / "mine.jsonl")
    small.stages = [{**SFT, "sequence_length": 512, "sources": mine}, rl,
                    {**EVAL, "compare": ["start"]}, RELEASE]
    first = small()
    made = {stage["kind"]: first.output(stage["kind"]) for stage in small.stages}
    chat_of_today = chat.render(first.model("rl").tokenizer, [{"role": "user", "content": "?"}])
    assert "28 Nov 2026" in chat_of_today
    release = first.path("release") / "release"
    assert "date: '2026-01-01'" in (release / "evidence" / "recipe.yaml").read_text()
    assert read_json(release / "evidence" / "eval-01" / "results.json")["date"] == "2026-01-01"
    Clock.today_is = (2026, 11, 29)
    assert all(check.ok for check in verify(release, 100))
    before, small.folder = small.folder, tmp_path / "tomorrow" / "r"
    second = small()
    assert made == {name: second.output(name) for name in made}

    path = release / "evidence" / "eval-01" / "results.json"
    text = path.read_text()
    path.write_text(text.replace("2026-01-01", "2026-01-02"))
    assert not all(check.ok for check in verify(release, 0))
    path.write_text(text)
    small.folder, small.values["date"] = before, "2026-01-02"
    assert small().output("sft") != made["sft"]
    assert (small.folder / "01-sft.old-1").exists()


def test_a_model_trained_on_own_texts(small: Small, tmp_path: Path) -> None:
    text = inspect.getsource(inspect)
    lines = [json.dumps({"text": text[n:n + 400]}) for n in range(0, 40_000, 400)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    mine = [{"source": str(tmp_path / "mine.jsonl")}]
    small.values["data"]["sources"] = mine
    small.stages[1] |= {"sources": mine, "validation_rows": 2}
    small()
    rows = (small.folder / "02-pretrain" / "metrics.jsonl").read_text().splitlines()
    assert "validation_loss" in json.loads(rows[-1])


def test_a_mixture_goes_through_its_stages(small: Small) -> None:
    """Its routing biases are trained, saved, and trained on after loading."""
    small.values["model"] |= {"experts": 4}
    small.stages.append(SFT)
    done = small()
    biases = [vicugna.load(done.path(stage) / "checkpoint").network.state_dict()[
        "model.layers.0.mlp.expert_bias"] for stage in ("pretrain", "sft")]
    assert biases[0].any() and not torch.equal(*biases)


@pytest.mark.parametrize(("stage", "said"), [
    ({**EVAL, "groups": [{"group": "g", "task": "reasoning.stepz", "n": 3}]}, "reasoning.steps"),
    ({**EVAL, "groups": [{"group": "g", "task": "reasoning.steps", "number": 3}]}, "number"),
    ({**SFT, "sources": ["gone.jsonl"]}, "gone.jsonl"),
    ({**SFT, "name": "tune", "sequence_length": 512, "sources": ["stdlib"]},
     r"stages\.tune\.sequence_length: sequences of 512 tokens, but the context holds 256"),
    ({"kind": "rl", "steps": 1, "name": "more", "tasks": ["stdlib"]},
     r"stages\.more\.tasks: 'stdlib' gives no rewards"),
])
def test_what_later_stages_need_is_checked_first(stage: dict[str, Any], said: str, small: Small
                                                 ) -> None:
    small.stages.append(stage)
    with pytest.raises(VicugnaError, match=said):
        small()
    assert not small.folder.exists()


@pytest.mark.parametrize(("stage", "sources"), [
    ("tokenizer", ["stdlib"]), ("tokenizer", ["corpus"]), ("pretrain", ["stdlib", "corpus"])])
@pytest.mark.parametrize("data", [None, {}, {"sources": []}])
def test_a_corpus_that_is_missing_is_named(data: Any, stage: str, sources: list[str], small: Small,
                                           tmp_path: Path) -> None:
    if stage == "pretrain":
        small.values["model"] = {"start": "llama"}
        del small.stages[0]
    small.stages[-1]["sources"] = sources
    del small.values["data"]
    if data is not None:
        small.values["data"] = data
    (tmp_path / "recipe.yaml").write_text(json.dumps(small.recipe))
    with pytest.raises(VicugnaError) as caught:
        read(tmp_path / "recipe.yaml")
    assert caught.value.what == ("data.sources is missing or empty, but this stage learns from "
                                 "`corpus`")
    assert caught.value.where == f"stages.{stage}.sources"


def test_recipes_of_the_repository_are_sound() -> None:
    for path in RECIPE.parent.glob("*.yaml"):
        run._check(read(path))

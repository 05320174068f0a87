"""Releases, and a battery of cheats that verification must catch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from vicugna import checkpoint, evals, models, tokenizer
from vicugna.errors import Refused, VicugnaError
from vicugna.files import canonical, digest_file, digest_of, read_json, write_json
from vicugna.ledger import Ledger
from vicugna.release import About, make_release, verify
from vicugna.release.contents import Contents, card, files_in, manifest

SPECS = [{"group": "needle", "task": "retrieval.single", "n": 10, "difficulty": {"length": 200},
          "max_new_tokens": 6},
         {"group": "steps", "task": "reasoning.steps", "n": 6, "max_new_tokens": 6}]
COST = {"flops": 1.5e12, "device_seconds": 12.5, "tokens": 4000, "peak_memory_bytes": 10**9}
RECIPE = """pretrain:\n  data:\n    sources: [stdlib, {task: retrieval.single, weight: 2}]\n"""
ABOUT = About("Kid", "A very small model.", ["It was never trained."])


@dataclass
class Workspace:
    folder: Path
    ledger: Ledger
    results: evals.Results

    def release(self, name: str = "out", **other: Any) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model_folder": self.folder / "model", "results_folders": [self.folder / "results"],
            "ledger": self.ledger, "recipe": self.folder / "recipe.yaml", "about": ABOUT, **other}
        return make_release(out_folder=self.folder / name, **given)


def write_model(folder: Path, seed: int) -> None:
    words = tokenizer.train(["The code of indigo barrel is 8715. Snow fell. Birds sang."] * 3, 280)
    network = models.build({
        "model_type": "llama", "vocab_size": words.vocab_size, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 600,
        "initializer_range": 0.5})
    models.initialise(network, seed)
    # Half of the vocabulary ends a reply, so that a random model's replies do end.
    checkpoint.Checkpoint(network, words, {"eos_token_id": list(range(0, 280, 2))}).save(folder)


def work(folder: Path, change: Callable[[Path], Any] = lambda model: None) -> Workspace:
    write_model(folder / "model", 0)
    change(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    ledger = Ledger(folder / "ledger.sqlite")
    model = checkpoint.read(folder / "model")
    assert model.tokenizer
    words = ledger.open("tokenizer", "product", "r", "0.1", "corpus")
    ledger.close(words, "done", COST, {"digest": "tokenizer"})
    trained = ledger.open("pretrain", "product", "r", "0.1", "corpus", ["tokenizer"])
    ledger.close(trained, "done", COST, {"digest": model.digest})
    plan = evals.build_plan(SPECS, model.tokenizer, date(2026, 1, 1))
    attempt = ledger.open("eval", "product", "r", "0.1", plan.digest, [model.digest])
    results = evals.run(model, plan, folder / "results", batch_size=4)
    ledger.close(attempt, "done", COST, {"digest": results.digest})
    ledger.open("rl", "research", "r", "0.1", "x", [model.digest])
    return Workspace(folder, ledger, results)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = work(tmp_path_factory.mktemp("work"))
    workspace.release()
    return workspace


@pytest.fixture
def release(made: Workspace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder / "out", tmp_path / "release"))


def failed(folder: Path, sample: int = 1000) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder, sample) if not check.ok}


def test_an_honest_release_holds(made: Workspace, release: Path) -> None:
    assert {record["outcome"] for record in evals.read_records(
        release / "evidence/eval-01/items.jsonl")} == {"wrong", "truncated"}
    seen: list[tuple[int, int]] = []
    checks = verify(release, 1000, lambda done, total: seen.append((done, total)))
    assert [check.name for check in checks if not check.ok] == []
    assert checks[-1].detail == "16 of 16 items have the same outcome when evaluated again"
    assert seen[-1] == (16, 16)
    assert [check.name for check in verify(release, 0)][-1] == "release digest"
    model = checkpoint.read(release)
    assert model.digest == made.results.model_digest == read_json(
        release / "manifest.json")["model_digest"]


def test_the_card_tells_what_was_measured(release: Path) -> None:
    text = (release / "README.md").read_text()
    for part in ("# Kid", "A `llama` network with ", "2 layers, width 16",
                 "| pretrain | 4,000 | 1.5e+12 |", "| needle | retrieval.single | length "
                 "200 | 10 | 0.0% | 0.0% to 27.8% (wilson)", "- It was never trained.",
                 "only 0.0% right of 10", "rl open: 1", "sources: [stdlib,",
                 "license: apache-2.0", "vicugna verify"):
        assert part in text, part
    rows = (release / "evidence" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(row)["content"]["attempt"] for row in rows] == [
        "tokenizer-1", "tokenizer-1", "pretrain-3", "pretrain-3", "eval-5", "eval-5"]


def test_times_and_costs_do_not_enter_the_release_digest(made: Workspace, tmp_path: Path) -> None:
    digest = read_json(made.folder / "out" / "manifest.json")["release_digest"]
    other = work(tmp_path)
    last = other.ledger.attempts()[-1].id
    other.ledger.close(last, "interrupted", {}, {})
    assert other.release()["release_digest"] == digest
    assert other.release()["release_digest"] == digest  # in place of the first


@pytest.mark.parametrize("case", ["results of other weights", "unfinished", "edited", "unknown "
                                  "weights", "unknown results", "no results", "broken ledger"])
def test_refused_with_nothing_written(made: Workspace, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "w"
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("out"))
    workspace = Workspace(folder, Ledger(folder / "ledger.sqlite"), made.results)
    other: dict[str, Any] = {}
    if case == "results of other weights":
        write_model(folder / "second", 1)
        other["model_folder"] = folder / "second"
    elif case == "unfinished":
        (folder / "results" / "results.json").unlink()
    elif case == "edited":
        change(folder / "results/results.json", '"n": 10', '"n": 9')
    elif case == "unknown weights":
        other["ledger"] = Ledger(tmp_path / "empty.sqlite")
    elif case == "unknown results":
        ledger = other["ledger"] = Ledger(tmp_path / "second.sqlite")
        ledger.close(ledger.open("pretrain", "product", "r", "0.1", "c"), "done", COST,
                     {"digest": made.results.model_digest})
    elif case == "no results":
        other["results_folders"] = []
    else:
        broken = (folder / "ledger.sqlite").read_bytes()
        (folder / "ledger.sqlite").write_bytes(broken.replace(b'"tokens":4000', b'"tokens":1000'))
    with pytest.raises(Refused):
        workspace.release(**other)
    assert not (folder / "out").exists() and not list(folder.glob(".out*"))


def test_bad_places(made: Workspace, tmp_path: Path) -> None:
    for given in ({"recipe": tmp_path / "none.yaml"}, {"model_folder": tmp_path}):
        with pytest.raises(VicugnaError):
            made.release("elsewhere", **given)
        assert not (made.folder / "elsewhere").exists()
    assert "files" in failed(tmp_path)


def test_all_of_a_checkpoint_is_released_and_nothing_else(tmp_path: Path) -> None:
    work(tmp_path, lambda model: beside(model, "additional_chat_templates/tool_use.jinja",
                                        "notes.txt", ".git/HEAD")).release()
    assert not failed(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "tool_use.jinja" in names and not names & {"notes.txt", ".git", "HEAD"}


def beside(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("anything")


PUT_BESIDE = [".gitattributes", ".gitignore", ".git/HEAD", ".git/objects/ab/cd", ".DS_Store",
              ".git/model.safetensors", "evidence/.DS_Store", ".huggingface/x.metadata",
              ".cache/huggingface/.gitignore", ".cache/huggingface/download/README.md.metadata",
              ".cache/huggingface/config.json"]
FOREIGN = ["model-00002-of-00002.safetensors", "tokenizer.model", "tekken.json", "vocab.json",
           "additional_chat_templates/tool.jinja", "modeling_other.py", "params.json",
           "original/params.json", "model.gguf", "adapter_config.json", "chat_template.json",
           "evidence/.gitattributes", ".cache/other/x", ".cache/huggingface.json", ".gitmodules",
           "evidence/.git/x", ".github/x", "sub/.git/x", "model.safetensors.index.json"]


def test_what_git_the_hub_and_macos_put_beside_a_release_is_ignored(release: Path) -> None:
    beside(release, *PUT_BESIDE)
    checks = verify(release)
    assert all(check.ok for check in checks)
    assert checks[0].detail.endswith(
        "ignored, as nothing in it is loaded: .DS_Store, .git, .gitattributes, .gitignore, "
        ".huggingface, .cache/huggingface, evidence/.DS_Store")
    (release / ".git").rename(release.parent / "git")
    (release / ".git").write_text("gitdir: ../elsewhere")  # of a submodule
    assert not failed(release, 0)


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_file_is_refused(name: str, release: Path) -> None:
    beside(release, name)
    assert failed(release, 0)["files"] == f"{name}: not in the manifest"


@pytest.mark.parametrize("name", [".git", ".gitattributes", ".cache/huggingface", "evidence/x"])
@pytest.mark.parametrize("target", ["/etc/hostname", "/etc", "config.json", "../blobs/1"])
def test_links_are_refused(name: str, target: str, release: Path) -> None:
    beside(release.parent / "blobs", "1")
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).symlink_to(release / target if target == "config.json" else target)
    assert "files" in failed(release, 0)


def test_weights_cannot_come_from_what_is_ignored(release: Path) -> None:
    """Not even of a release whose maker planned it: others could change them."""
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / "model.safetensors").rename(release / ".cache" / "huggingface" / "w.safetensors")
    names = checkpoint.survey(work(release.parent / "other").folder / "model").stored
    write_json(release / "model.safetensors.index.json", {
        "weight_map": dict.fromkeys(names, ".cache/huggingface/w.safetensors")})
    hash_again(release)
    assert "not in the manifest" in failed(release, 0)["model"]


def cached(release: Path, cache: Path) -> Path:
    """The release as the Hub's client keeps it: a snapshot of links to blobs."""
    root = cache / "models--org--name"
    for number, path in enumerate(sorted(p for p in release.rglob("*") if p.is_file())):
        blob, link = root / "blobs" / f"{number:040}", root / "snapshots" / ("5" * 40)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link = link / path.relative_to(release)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    beside(root, "refs/main")
    (root / "refs" / "main").write_text("5" * 40)
    return root / "snapshots" / ("5" * 40)


def test_a_release_in_the_hubs_cache(release: Path, tmp_path: Path, cli: Any,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    beside(release, ".gitattributes")
    snapshot = cached(release, tmp_path / "hub")
    assert not failed(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("org/name", f"org/name@{'5' * 40}"):
        ended = cli("verify", name, "--sample", "4")
        assert ended.code == 0 and "ignored" in ended.out, ended
    ended = cli("verify", "org/other")
    assert ended.code == 2 and "the Hub could not be reached" in ended.line
    ended = cli("verify", release / "README.md")
    assert ended.code == 2 and "a file, not a folder" in ended.line
    (snapshot / "README.md").unlink()
    assert failed(snapshot, 0)["files"].startswith("README.md: missing. Connect to the network")
    beside(tmp_path, "x")
    (snapshot / "README.md").symlink_to(tmp_path / "x")
    assert "leads out of the folder" in failed(snapshot, 0)["files"]


# --- cheats: each changes a copy of the release; `hash_again` then makes the manifest fit ---------

def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def hash_again(folder: Path) -> None:
    """Everything of the manifest that can be computed from the changed files."""
    try:
        content = manifest(Contents(folder))
    except Exception:
        content = {**read_json(folder / "manifest.json"), "files": files_in(folder)[0]}
    write_json(folder / "manifest.json", content)


def rewritten(folder: Path, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
              **other: Any) -> None:
    """Change the items, and then results, ledger, card and manifest so that all agree."""
    evaluation = folder / "evidence" / "eval-01"
    content = read_json(evaluation / "results.json") | other
    records = edit(evals.read_records(evaluation / "items.jsonl"))
    for record in records:
        record["id"] = evals.PlannedItem.from_dict(record).id
    (evaluation / "items.jsonl").write_bytes(b"".join(canonical(r) + b"\n" for r in records))
    items = [evals.PlannedItem.from_dict(record) for record in records]
    plan = evals.Plan(items, date.fromisoformat(content["date"])).digest
    results = evals.Results.of({**content, "plan_digest": plan}, records, content["platform"])
    write_json(evaluation / "results.json", results.to_dict())
    chain_again(folder, {content["results_digest"]: results.digest, content["plan_digest"]: plan})
    write_card(folder)
    hash_again(folder)


def chain_again(folder: Path, changes: dict[str, str]) -> None:
    path = folder / "evidence" / "ledger.jsonl"
    text = path.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    rows = [json.loads(line) for line in text.splitlines()]
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        row["hash"] = digest_of([row["seq"], row["previous"], row["content"]])
        if after and after["seq"] == row["seq"] + 1:
            after["previous"] = row["hash"]
    path.write_bytes(b"".join(canonical(row) + b"\n" for row in rows))


def write_card(folder: Path) -> None:
    (folder / "README.md").write_text(card(Contents(folder)))


def edited_score(folder: Path) -> None:
    change(folder / "README.md", "| 10 | 0.0%", "| 10 | 90.0%")


def edited_template(folder: Path) -> None:
    change(folder / "chat_template.jinja", "user", "uzer") if "user" in (
        folder / "chat_template.jinja").read_text() else change(
        folder / "chat_template.jinja", "assistant", "asistant")


def edited_table(folder: Path) -> None:
    path = folder / "evidence" / "eval-01" / "results.json"
    content = read_json(path)
    content["rows"][0].update(right=10, wrong=0, truncated=0, accuracy=1.0)
    content["results_digest"] = digest_of({k: v for k, v in content.items() if k not in (
        "format", "platform", "results_digest")})
    write_json(path, content)


def swapped_weights(folder: Path) -> None:
    write_model(folder.parent / "other", 1)
    shutil.copyfile(folder.parent / "other" / "model.safetensors", folder / "model.safetensors")


def lied_about_outcome(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records[0].update(outcome="right", score=1.0, finish_reason="stop")
    return records


def put_answers_in(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records[:4]:
        record.update(outcome="right", score=1.0, response=record["expected"], error=None,
                      finish_reason="stop")
    return records


def delete_hard_items(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seeds = sorted(r["seed"] for r in records if r["group"] == "needle")
    return [r for r in records if r["group"] != "needle" or r["seed"] not in (seeds[0], seeds[4])]


def duplicate_items(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0], *records]


def easier_questions(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    next(r for r in records if r["group"] == "needle")["difficulty"]["length"] = 0
    return records


def renamed_errors(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records[0].update(outcome="error", score=None, finish_reason="", error="network failure")
    return records


PLAIN: dict[str, Callable[[Path], Any]] = {
    "flipped bit in the weights": lambda folder: flip(folder / "model.safetensors"),
    "edited score in the card": edited_score,
    "changed template": edited_template,
    "edited table": edited_table,
    "extra file": lambda folder: (folder / "extra.py").write_text("pass"),
    "hidden extra file": lambda folder: (folder / "evidence" / ".x").write_text(""),
    "missing evidence": lambda folder: (folder / "evidence" / "recipe.yaml").unlink(),
    "link": lambda folder: (folder / "evidence" / "link").symlink_to("/etc/hostname"),
    "edited recipe": lambda folder: change(folder / "evidence/recipe.yaml", "2", "3"),
    "edited cost": lambda folder: change(folder / "evidence/ledger.jsonl", "4000", "40"),
    "edited config": lambda folder: change(folder / "config.json", '"rope_theta": 10000.0',
                                           '"rope_theta": 20000.0'),
    "edited generation config": lambda folder: change(folder / "generation_config.json", "\n    4,",
                                                      "\n    5,"),
    "swapped weights": swapped_weights,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest of another digest": lambda folder: change(
        folder / "manifest.json", '"release_digest": "', '"release_digest": "0'),
    "no items": lambda folder: (folder / "evidence/eval-01/items.jsonl").write_text(""),
    "no evaluation": lambda folder: shutil.rmtree(folder / "evidence/eval-01"),
    "dropped ledger row": lambda folder: (folder / "evidence/ledger.jsonl").write_text(
        "".join((folder / "evidence/ledger.jsonl").read_text().splitlines(True)[:-1])),
}
CONSISTENT = [lied_about_outcome, put_answers_in, delete_hard_items, duplicate_items,
              easier_questions, renamed_errors]


@pytest.mark.parametrize("cheat", PLAIN)
def test_a_changed_file_is_found(release: Path, cheat: str) -> None:
    PLAIN[cheat](release)
    assert failed(release, 0)


@pytest.mark.parametrize("cheat", [name for name in PLAIN if name not in (
    "extra file", "hidden extra file", "edited recipe", "no manifest", "link",
    "manifest of another digest")])
def test_making_the_manifest_fit_does_not_help(release: Path, cheat: str) -> None:
    PLAIN[cheat](release)
    hash_again(release)
    assert failed(release, 0)


@pytest.mark.parametrize("cheat", CONSISTENT)
def test_nor_does_making_everything_fit(release: Path, cheat: Callable[..., Any]) -> None:
    rewritten(release, cheat)
    found = failed(release)
    assert found
    assert not {"files", "card", "ledger", "release digest"} & found.keys()


def test_swapped_weights_under_rewritten_evidence_give_other_answers(release: Path) -> None:
    swapped_weights(release)
    evaluation = release / "evidence" / "eval-01"
    content = read_json(evaluation / "results.json")
    digest = checkpoint.read(release).digest
    results = evals.Results.of({**content, "model_digest": digest}, evals.read_records(
        evaluation / "items.jsonl"), content["platform"])
    write_json(evaluation / "results.json", results.to_dict())
    chain_again(release, {content["results_digest"]: results.digest,
                          content["model_digest"]: digest})
    write_card(release)
    hash_again(release)
    assert failed(release, 0) == {}
    assert failed(release).keys() == {"sample"}


def test_another_date_gives_other_prompts_where_the_template_writes_it(tmp_path: Path) -> None:
    def dated(model: Path) -> None:
        template = model / "chat_template.jinja"
        template.write_text("{{ strftime_now('%Y-%m-%d') }}" + template.read_text())

    work(tmp_path, dated).release()
    assert failed(tmp_path / "out") == {}
    rewritten(tmp_path / "out", lambda records: records, date="2026-01-02")
    assert failed(tmp_path / "out").keys() == {"sample"}
    change(tmp_path / "out/evidence/eval-01/results.json", "2026-01-02", "2026-01-01")
    assert failed(tmp_path / "out", 0)


def test_the_control_rewriting_without_a_change_holds(release: Path) -> None:
    rewritten(release, lambda records: records)
    assert failed(release) == {}


def test_every_single_byte_flip_is_found(release: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = sorted(path for path in release.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        at = int(torch.randint(len(data), (), generator=generator))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        assert failed(release, 0), path
        path.write_bytes(data)
    assert failed(release, 0) == {} and digest_file(files[0])


def test_elsewhere_a_small_share_of_outcomes_may_differ(release: Path) -> None:
    def moved(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records[-1]["response"] += "?"
        return records

    rewritten(release, moved)
    assert failed(release).keys() == {"sample"}
    path = release / "evidence" / "eval-01" / "results.json"
    change(path, read_json(path)["platform"], "another machine")
    hash_again(release)
    assert failed(release) == {}
    assert "another platform" in verify(release, 1000)[-1].detail

"""The report page: what it shows is what was measured, and nothing on it runs."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from vicugna import evals, tokenizer
from vicugna.engine import Sampling
from vicugna.errors import VicugnaError
from vicugna.evals.runner import Reply, make_item
from vicugna.files import digest_of, write_json
from vicugna.ledger import Ledger
from vicugna.release.report import write_report

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example onerror=x> $\\frac$ \x00"
LOUD = "<b>$x^$ loud</b>"
SPECS = [{"group": LOUD, "task": "retrieval.single", "n": 2, "length_tokens": length,
          "difficulty": {"position": position}, "max_new_tokens": 8}
         for length in (500, 1000) for position in (0.0, 1.0)]
SPECS += [{"group": "deep", "task": "reasoning.steps", "n": 6, "difficulty": {"depth": depth},
           "max_new_tokens": 30} for depth in (2, 10)]
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 8, "max_position_embeddings": 600, "tie_word_embeddings": True}
STAGES = ("tokenizer", "pretrain", "sft", "rl", "eval", "release")


class Scripted:
    """Knows every answer, and gives the right one to `share` of the questions."""

    precision, platform = "float32", "here"

    def __init__(self, plan: Sequence[evals.PlannedItem], share: float) -> None:
        self.digest, self.share, self.answers = digest_of(share), share, {}
        for item in map(make_item, plan):
            assert not isinstance(item, str)
            self.answers[item.messages[-1]["content"]] = item.answer

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        replies = []
        for (message,), sampling in zip(conversations, samplings, strict=True):
            right = sampling.seed % 100 < 100 * self.share
            text = self.answers[message["content"]] if right else HOSTILE
            replies.append(Reply(text, HOSTILE, 5, "stop", digest_of(message)))
        return replies


def metrics(stage: str, steps: int) -> list[dict[str, Any]]:
    rows = [{"step": k, "loss": 5 / (k + 1), "grad_norm": 1.0, "lr": 0.1, "tokens": 64 * (k + 1),
             "tokens_per_second": 1234.5, "mfu": 0.5, "skipped": 0} for k in range(steps)]
    rows[2] |= {"loss": float("nan"), "mfu": None}
    rows[-1]["validation_loss"] = 1.5
    if stage == "rl":
        rows = [{**row, "reward": 0.25, "truncated": 0.125, "length": 17.0} for row in rows]
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("work") / "run"
    words = tokenizer.train(["The code of indigo barrel is 8715. Snow fell. Birds sang."] * 3, 300)
    ledger = Ledger(run / "ledger.sqlite")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "kid", "stages": [
        {"kind": kind, "name": kind, **({"title": LOUD} if kind == "release" else {}),
         **({"sequence_length": 500} if kind == "pretrain" else {})} for kind in STAGES]}))
    for number, stage in enumerate(STAGES, start=1):
        folder = run / f"{number:02}-{stage}"
        cost = {"flops": number * 1.5e12, "device_seconds": 12.5, "tokens": 4321 * number,
                "peak_memory_bytes": 10**9}
        attempt = ledger.open(stage, "research", "r", "0.1", "d")
        ledger.close(attempt, "done", cost, {"digest": stage})
        write_json(folder / "stage.json", {"stage": stage, "inputs": {}, "output": stage,
                                           "cost": cost, "attempt": attempt})
        if stage in ("pretrain", "sft", "rl"):
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in metrics(stage, 20)) + '{"step": 20, "lo')
    ledger.open("rl", "research", "r", "0.1", LOUD)
    write_json(run / "06-release/release/config.json", CONFIG)
    write_json(run / "06-release/release/manifest.json", {"release_digest": "abc123"})
    plan = evals.build_plan(SPECS, words, date(2026, 1, 1))
    for name, share in (("sft", 0.3), ("rl", 0.5)):
        evals.run(Scripted(plan.items, share), plan, run / "05-eval" / name)
    write_report(run, run / "ledger.sqlite")
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


class Page(HTMLParser):
    """The tables' cells, the tags with their attributes, and the text, of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cell, self.text = False, ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.cell = tag in ("td", "th") or (self.cell and tag not in ("tr", "table"))

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data


def report(run: Path) -> Page:
    return Page(write_report(run, run / "ledger.sqlite"))


def test_the_page_shows_every_part(made: Path) -> None:
    page = Page(made / "report.html")
    for part in ("Pretraining: loss", "Fine-tuning: loss", "tokens in a reply", "Retrieval",
                 "before and after reinforcement learning", "All results", "Cost", "Recipe",
                 "abc123", "network of 9,488 parameters", "Its chain of 7 attempts is intact",
                 "sequence_length: 500", "1,000 tokens, 2 times the length it was trained on",
                 "The same questions were put", "mean reward", "validation", "n=2", "2×"):
        assert part in page.text, part
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert page.tables[0][0] == ["depth", "500", "1,000 2×"]
    assert page.tables[0][2][0] == "100%" and page.tables[0][2][2].endswith("%n=2")
    samples = re.findall(r"Start [a-zA-Z] \d", page.text)
    assert len(samples) == 2  # one that is right and one that is not


def test_the_numbers_are_those_of_the_results(made: Path) -> None:
    page = Page(made / "report.html")
    for name, table in zip(("rl", "sft"), page.tables[3:5], strict=True):
        results, _ = evals.read_results(made / "05-eval" / name)
        shown = {tuple(cells[:8]) for cells in table if len(cells) == 10}
        assert len(shown) == len(results.rows) + 1
        for row in results.rows:
            assert (row.task, row.difficulty, *map(str, (row.n, row.right, row.wrong, row.error,
                    row.truncated)), f"{100 * row.accuracy:.1f}%") in shown
    before, after = (evals.read_results(made / "05-eval" / name)[0].rows for name in ("sft", "rl"))
    old, new = (next(row for row in rows if row.difficulty == "depth 10")
                for rows in (before, after))
    cells = page.tables[2][-1]  # sorted as numbers: depth 10 comes last
    assert cells[:3] == ["reasoning.steps", "depth 10", "6"]
    assert [cell.strip() for cell in cells[4:8]] == [
        f"{100 * old.accuracy:.1f}%", f"{100 * old.low:.1f} to {100 * old.high:.1f}",
        f"{100 * new.accuracy:.1f}%", f"{100 * new.low:.1f} to {100 * new.high:.1f}"]
    assert cells[8].split()[0] == f"{100 * (new.accuracy - old.accuracy):+.1f}"


def test_costs_and_their_total(made: Path) -> None:
    costs = Page(made / "report.html").tables[5]
    assert costs[2] == ["Pretraining", "8,642", "3.00\u2009×\u200910" "12", "12.5", "691", "1.00",
                        "pretrain-3"]
    assert costs[-1][:4] == ["Total", "90,741", "3.15\u2009×\u200910" "13", "75.0"]


def test_hostile_text_stays_text(made: Path) -> None:
    page = Page(made / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "link"}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and f"{LOUD} – report" in page.text
    assert LOUD not in (made / "report.html").read_text()


def test_the_page_needs_nothing_else_and_runs_nothing(made: Path) -> None:
    page = Page(made / "report.html")
    links = [value for _, attrs in page.tags for key, value in attrs.items()
             if key in ("src", "href", "xlink:href", "action", "srcset")]
    assert links and all(value and value.startswith("#") for value in links)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content":
                     "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags
    text = (made / "report.html").read_text()
    assert not re.findall(r"url\((?!#)|@import", text)
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(figure)


def test_the_same_run_gives_the_same_bytes(made: Path, run: Path) -> None:
    write_report(run, run / "ledger.sqlite")
    assert (run / "report.html").read_bytes() == (made / "report.html").read_bytes()


@pytest.mark.parametrize("kept", [(), ("01-tokenizer",), ("02-pretrain", "03-sft"), ("04-rl",),
                                  ("05-eval",), ("06-release",)])
def test_any_stages_may_be_missing(run: Path, kept: tuple[str, ...]) -> None:
    for folder in run.glob("0*"):
        if folder.name not in kept:
            shutil.rmtree(folder)
    (run / "ledger.sqlite").unlink()
    if len(kept) != 1:
        (run / "recipe.yaml").unlink()
    page = report(run)
    assert not (run / "ledger.sqlite").exists()
    headings = {attrs.get("id") for tag, attrs in page.tags if tag == "h2"}
    assert ("results" in headings) == ("05-eval" in kept) == ("retrieval" in headings)
    assert ("training" in headings) == bool({"02-pretrain", "04-rl"} & set(kept))
    assert ("cost" in headings) == bool(kept) and "ledger" not in headings


def test_one_checkpoint_alone(run: Path) -> None:
    shutil.rmtree(run / "05-eval" / "sft")
    page = report(run)
    assert "before and after" not in page.text and "change" not in page.tables[2][0]
    (run / "05-eval" / "rl" / "results.json").unlink()  # not finished
    assert "No evaluation has finished yet" in report(run).text


def test_odd_values_are_shown_as_absent(run: Path) -> None:
    odd = {"tokens": None, "flops": float("inf"), "device_seconds": 0, "peak_memory_bytes": "much"}
    write_json(run / "02-pretrain" / "stage.json", {"cost": odd})
    write_json(run / "03-sft" / "stage.json", {"cost": None})
    write_json(run / "04-rl" / "stage.json", [])
    (run / "02-pretrain" / "metrics.jsonl").write_text('[]\n{"step": 0, "loss": null}\n\n17\n')
    (run / "recipe.yaml").write_text("pretrain: [\x01: {{")
    page = report(run)
    assert page.tables[5][2] == ["Pretraining", "–", "–", "0.0", "–", "–", ""]
    assert "Pretraining: loss" not in page.text


def test_a_broken_ledger_is_told_of(run: Path) -> None:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE rows SET content = replace(content, 'research', 'product') "
                   "WHERE seq = 3")
    assert "Its chain is broken: row 3: it" in report(run).text
    (run / "ledger.sqlite").write_text("no database at all" * 100)
    assert "no usable SQLite file" in report(run).text


def test_bad_input_is_one_clean_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(VicugnaError, match="no such file or folder"):
        write_report(tmp_path / "nowhere", tmp_path / "ledger.sqlite")
    (run / "05-eval/rl/items.jsonl").write_text("{}")
    before = (run / "report.html").read_bytes()
    with pytest.raises(VicugnaError, match=re.escape("items.jsonl line 1")):
        report(run)
    assert (run / "report.html").read_bytes() == before

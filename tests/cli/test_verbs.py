"""Every verb's happy path on a small run, and how each of them ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import RECIPE, SMALLER, Ended, arguments, start


def one_object(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1
    return json.loads(ended.out)


@pytest.fixture
def release(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "06-release" / "release", tmp_path / "release"))


def test_run_again_finds_all_done(tiny: Path, cli: Any) -> None:
    ended = cli(*arguments(tiny), "--json")
    stages = one_object(ended)["stages"]
    assert list(stages) == ["tokenizer", "pretrain", "sft", "rl", "eval", "release"]
    assert all(stages.values())
    assert ended.err.count("up to date") == 6 and "\r" not in ended.err


def test_run_ends_with_a_table_and_the_next_commands(tiny: Path, cli: Any) -> None:
    ended = cli(*arguments(tiny))
    assert ended.code == 0
    for word in ("pretrain", "retrieval.single", "report.html", "vicugna chat", "vicugna verify"):
        assert word in ended.out


def test_train_does_one_stage(tmp_path: Path, cli: Any) -> None:
    settings = [part for setting in SMALLER for part in ("--set", setting)]
    ended = cli("train", RECIPE, "--stage", "sft", "--out", tmp_path / "r", *settings)
    assert ended.code == 2 and "stage pretrain is not done" in ended.line
    for stage in ("tokenizer", "pretrain"):
        stages = one_object(cli("train", RECIPE, "--stage", stage, "--out", tmp_path / "r",
                                *settings, "--json"))["stages"]
        assert stages[stage]["output"] and not stages["sft"]
    ended = cli("train", RECIPE, "--stage", "sfft", "--out", tmp_path / "r")
    assert ended.code == 2 and "no stage 'sfft'" in ended.line and "'sft'?" in ended.line


def test_two_ranks_share_an_eval_stage(tiny: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(tiny.parent, tmp_path / "runs")
    for name in ("05-eval", "06-release"):
        shutil.rmtree(runs / "tiny" / name)
    settings = [part for setting in SMALLER for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m",
         "vicugna", "train", RECIPE, "--stage", "eval", "--out", runs / "tiny", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = sorted(path.relative_to(tiny) for path in tiny.glob("05-eval/*/*.json*"))
    assert len(made) >= 3
    for path in made:
        assert (runs / "tiny" / path).read_bytes() == (tiny / path).read_bytes()


def test_eval_of_a_recipe(tiny: Path, tmp_path: Path, cli: Any) -> None:
    book = tmp_path / "book"
    command = ("eval", tiny / "03-sft" / "checkpoint", "--recipe", tiny / "recipe.yaml",
               "--workspace", book)
    results = one_object(cli(*command, "--json"))
    again = one_object(cli(*command, "--json"))  # found, not asked again
    assert results == again and sum(row["n"] for row in results["rows"]) == 7
    attempts = one_object(cli("ledger", book, "--json"))["attempts"]
    assert [a["kind"] for a in attempts] == ["eval"]
    assert attempts[0]["outcome"] == "done"


def test_eval_of_own_items(tiny: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "ctx.txt").write_text("The code is 12.")
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "2 + 2?", "answers": ["4"], "task": "sums"}\n'
        '{"prompt": "The code?", "context_file": "ctx.txt", "answers": ["12"]}\n')
    command = ("eval", tiny / "06-release" / "release", "--items", tmp_path / "mine.jsonl",
               "--max-new-tokens", "4", "--workspace", tmp_path / "book")
    assert sum(row["n"] for row in one_object(cli(*command, "--json"))["rows"]) == 2
    assert "sums" in cli(*command).out
    ended = cli("eval", tiny / "06-release" / "release")
    assert ended.code == 2 and "either --items or --recipe" in ended.line


def test_release_verb(tiny: Path, cli: Any) -> None:
    made = one_object(cli("release", tiny, "--json"))
    manifest = json.loads((Path(made["release"]) / "manifest.json").read_text())
    assert made["release_digest"] == manifest["release_digest"]
    ended = cli("release", tiny.parent)
    assert ended.code == 2 and "no recipe.yaml" in ended.line


def test_verify_accepts(release: Path, cli: Any) -> None:
    checked = one_object(cli("verify", release, "--json", "--sample", "4"))
    assert checked["ok"] and all(check["ok"] for check in checked["checks"])
    ended = cli("verify", release, "--sample", "0")
    assert ended.code == 0 and "The release holds." in ended.out


@pytest.mark.parametrize("what", ["weight", "score", "template"])
def test_verify_says_no(what: str, release: Path, cli: Any) -> None:
    if what == "weight":
        path = release / "model.safetensors"
        changed = bytearray(path.read_bytes())
        changed[-5] ^= 1
    elif what == "score":
        path = release / "README.md"
        changed = bytearray(path.read_bytes().replace(b"| 0.0% |", b"| 9.0% |", 1))
    else:
        path = release / "chat_template.jinja"
        changed = bytearray(path.read_bytes() + b" ")
    assert path.read_bytes() != changed
    path.write_bytes(changed)
    ended = cli("verify", release, "--sample", "4")
    assert ended.code == 1 and "does NOT hold" in ended.out
    ended = cli("verify", release, "--sample", "4", "--json")
    assert ended.code == 1 and json.loads(ended.out)["ok"] is False


def test_ledger(tiny: Path, cli: Any) -> None:
    printed = one_object(cli("ledger", tiny.parent, "--json"))
    kinds = [a["kind"] for a in printed["attempts"]]
    assert printed["intact"]
    assert {*kinds} == {"tokenizer", "pretrain", "sft", "rl", "eval", "release"}
    assert {a["outcome"] for a in printed["attempts"]} == {"done"}
    made = {a["kind"]: a for a in printed["attempts"]}
    assert made["rl"]["parents"] == [made["sft"]["result"]["digest"]]
    assert "The chain is intact." in cli("ledger", tiny.parent).out
    ended = cli("ledger", tiny)
    assert ended.code == 2 and "no ledger here" in ended.line


def test_ledger_broken(tiny: Path, tmp_path: Path, cli: Any) -> None:
    import sqlite3
    shutil.copytree(tiny.parent, tmp_path / "runs", ignore=shutil.ignore_patterns("tiny"))
    with sqlite3.connect(tmp_path / "runs" / "ledger.sqlite") as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE rows SET content = replace(content, 'done', 'ok') WHERE seq = 2")
    ended = cli("ledger", tmp_path / "runs", "--json")
    assert ended.code == 1 and not json.loads(ended.out)["intact"]


def test_info(tiny: Path, cli: Any) -> None:
    printed = one_object(cli("info", tiny / "02-pretrain" / "checkpoint", "--json"))
    done = json.loads((tiny / "02-pretrain" / "stage.json").read_text())
    assert printed["digest"] == done["output"] and printed["model_type"] == "vicugna"
    assert "parameters" in cli("info", tiny / "02-pretrain" / "checkpoint").out


def test_bench(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "quick.py").write_text('print("a table")\nprint(\'{"speed": 2}\')\n')
    (tmp_path / "no.py").write_text("raise SystemExit(1)\n")
    assert one_object(cli("bench", "quick", "--folder", tmp_path, "--json")) == {"speed": 2}
    assert cli("bench", "no", "--folder", tmp_path).code == 1
    ended = cli("bench", "quik", "--folder", tmp_path)
    assert ended.code == 2 and "Did you mean 'quick'?" in ended.line
    ended = cli("bench", "quick", "--folder", tmp_path / "elsewhere")
    assert ended.code == 2 and "they are in the repository, not in the package" in ended.line


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    process = start("--debug", "info", str(tmp_path / "none"))
    out, err = process.communicate()
    assert process.returncode and out == "" and "Traceback" in err
    assert "no such file or folder" in err


@pytest.mark.parametrize("wrong", [["nonsense"], ["run"], ["run", "x.yaml", "--sett", "a=1"],
                                   ["eval", "m", "--batch", "none"], ["verify", "f", "--sample",
                                                                      "-1"]])
def test_wrong_usage_is_one_line(wrong: list[str], cli: Any) -> None:
    ended = cli(*wrong)
    assert ended.code == 2 and ended.line


def test_no_torch_for_help() -> None:
    code = "import sys, vicugna.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

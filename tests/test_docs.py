"""The commands and snippets of README and guide are right: all are parsed, the quick ones are run.

A command is run in `test_the_quick_commands_run`, or stands in NOT_RUN with what covers it instead.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vicugna.cli import app
from vicugna.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "docs/guide.md", "CONTRIBUTING.md")]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Parsed, but not run here: a pattern, and why.
NOT_RUN = {
    r"speedrun|\bRECIPE\b|\bfinetune\b": "takes minutes; tests/test_run.py runs a smaller recipe",
    r"\bmine\.(jsonl|yaml)": "is about the reader's own files",
    r"\bserve\b": "runs until it is stopped; tests/server",
    r"smollm2": "needs its weights; tests on them are beside those of each package",
    r"torchrun": "needs many processes; tests/training runs two",
    r"\bhf auth|org/name|meta-llama": "needs the Hub",
    r"llama-?cpp|LLAMA_CPP": "compiles llama.cpp",
    r"\bpip install|^make |pytest|apt-get|\.ci/run|pre-commit": "sets up or tests the project",
    r"vicugna bench|--chart": "takes minutes",
    r"\bconvert\b": "needs a model llama.cpp knows; tests/cli/test_convert.py",
    r"vicugna (VERB|--debug VERB)|\bread\b|\bask\b": "stands for all verbs, or for one to come",
}


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every code block; that of an indented block is "indented"."""
    text = page.read_text()
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:\A|\n\n)((?:    [^\n]*\n|\n(?=    ))+)", rest)
    return [*fenced, *(("indented", re.sub(r"^    ", "", block, flags=re.M)) for block in indented)]


def commands(within_text: bool = True) -> list[str]:
    """The command lines in code blocks, and those with arguments within the text."""
    found = []
    for page in PAGES:
        for language, block in code_blocks(page):
            if language in ("indented", "bash", "sh", "console") and not block.startswith(
                    ("import ", "{", " ")):
                found += [line for line in block.splitlines() if line.strip()]
        inline = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:vicugna \w+|make) [^`]+)`", page.read_text())
        found += [" ".join(command.split()) for command in inline if within_text]
    return list(dict.fromkeys(found))


def words_of(command: str) -> list[str]:
    """Its last program and arguments, without variables, the launcher and comments."""
    words = shlex.split(command.replace("...", "X"), comments=True)
    if "|" in words:
        words = words[words.index("|") + 1:]
    if "--no-python" in words:
        words = words[words.index("--no-python") + 1:]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def test_there_are_commands() -> None:
    assert len(commands()) > 25 and any("vicugna eval" in command for command in commands())


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_options(command: str) -> None:
    program, *arguments = words_of(command)
    if program == "vicugna" and (arguments[0] in VERBS or "VERB" not in arguments):
        verb = VERBS[arguments[0]]
        verb.make_context(arguments[0], arguments[1:])  # an unknown option raises
    elif program == "make" and shutil.which("make"):
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == ".ci/run":
        assert (ROOT / program).stat().st_mode & 0o100


def folder_of(tiny: Path, tmp_path: Path) -> Path:
    """A workspace with a run `runs/mine` that has every stage, and the guide's questions."""
    shutil.copytree(tiny.parent, tmp_path / "runs")
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "mine")
    lines = re.findall(r'^ {4}(\{"(?:prompt|messages)".*"answers".*\})$',
                       (ROOT / "docs/guide.md").read_text(), re.M)
    assert len(lines) >= 3
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "contract.txt").write_text("Signed by Ann Lee.")
    return tmp_path


def test_the_quick_commands_run(cli: Any, tiny: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(tiny, tmp_path))
    release = "runs/mine/06-release/release"
    for command in commands(within_text=False):
        if any(re.search(pattern, command) for pattern in NOT_RUN):
            continue
        typed, _, command = command.rpartition("|")
        said = "".join(shlex.split(typed)[1:2]) + "\n"
        monkeypatch.setattr("sys.stdin", open_text(tmp_path / "typed", said))
        words = [{"MODEL": release, "RELEASE": release, "RUN": "runs/mine", "CONFIG": release}.get(
            word, word) for word in words_of(command)]
        assert words[0] == "vicugna", f"{command}: run it here, or say in NOT_RUN why not"
        ended = cli(*words[1:])
        assert ended.code == 0, (command, ended.err)


def open_text(path: Path, text: str) -> object:
    path.write_text(text)
    return path.open()


def test_the_python_of_the_guide_runs(tiny: Path, tmp_path: Path) -> None:
    folder = folder_of(tiny, tmp_path)
    (folder / "runs/speedrun").symlink_to(folder / "runs/mine")
    blocks = [block for page in PAGES for language, block in code_blocks(page)
              if language == "python" or block.startswith("import ")]
    whole = [block for block in blocks if block.startswith("import vicugna")]
    assert len(whole) >= 2
    for block in blocks:
        compile(block, "guide", "exec")
    for block in whole:
        code = re.sub(r"(max_new_tokens=)\d+", r"\g<1>4", block)
        code = code.replace('stream("def main(",', 'stream("def main(", max_new_tokens=4,')
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True,
                       timeout=120)


def test_the_recipes_of_the_guide_are_valid() -> None:
    recipes = [yaml.safe_load(block) for page in PAGES for language, block in code_blocks(page)
               if language == "yaml" and "stages:" in block]
    assert len(recipes) >= 2
    for recipe in recipes:
        Recipe.model_validate(recipe)


def test_links_within_the_repository_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "SECURITY.md", ROOT / "docs/architecture.md"]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {link}"
            if anchor and path.suffix == ".md":
                heads = [re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-")
                         for head in re.findall(r"^#+ (.*)$", path.read_text(), re.M)]
                assert anchor in heads, f"{page.name}: {link}"

"""A wheel is enough: built from the tree, installed elsewhere, its verbs run away from the tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runs import SMALLER

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; built without network, by the installed hatchling."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet",
                    "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT],
                   check=True, cwd=folder)
    (built,) = folder.glob("vicugna-*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing of the repository in it, and the wheel installed in `packages`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install",
                    "--quiet", "--no-deps", "--no-index", "--target", folder / "packages", wheel],
                   check=True, cwd=folder)
    return folder


def vicugna(elsewhere: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "packages"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "vicugna", *arguments], cwd=elsewhere, input=typed,
                          env=environment, capture_output=True, text=True, timeout=240)


def test_recipes_and_templates_travel_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for recipe in (ROOT / "recipes").iterdir():
        assert f"vicugna/recipes/{recipe.name}" in names
    for path in (ROOT / "src").rglob("*.*"):
        if path.suffix not in (".pyc", ".so"):
            assert str(path.relative_to(ROOT / "src")) in names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)


def test_the_verbs_run_from_it(elsewhere: Path) -> None:
    code = "import vicugna; print(vicugna.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(elsewhere / "packages")},
                           capture_output=True).stdout.strip()
    assert where.startswith(str(elsewhere))

    settings = [part for setting in SMALLER for part in ("--set", setting)]
    run = vicugna(elsewhere, "run", "tiny", "--json", *settings)
    assert run.returncode == 0, run.stderr
    folder = elsewhere / json.loads(run.stdout)["run"]
    (release,) = folder.glob("*-release/release")

    info = vicugna(elsewhere, "info", str(release), "--json")
    assert info.returncode == 0 and json.loads(info.stdout), info.stderr
    verified = vicugna(elsewhere, "verify", str(release))
    assert verified.returncode == 0, verified.stderr
    answer = vicugna(elsewhere, "chat", str(release), "--max-new-tokens", "8", "--json",
                     typed="Start k 3. k>m +2. m?\n")
    assert answer.returncode == 0 and json.loads(answer.stdout)["tokens"] <= 8, answer.stderr


def test_the_chats_of_a_recipe_are_found_by_its_name(elsewhere: Path) -> None:
    code = ("from vicugna.data.sources import SourceSpec, paths\n"
            "print(*paths(SourceSpec(source='recipes/chats.jsonl')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(elsewhere / "packages")},
                          capture_output=True)
    assert done.stdout.strip() == str(elsewhere / "packages/vicugna/recipes/chats.jsonl")


def test_bench_says_that_it_needs_the_repository(elsewhere: Path) -> None:
    done = vicugna(elsewhere, "bench", "train_throughput")
    assert done.returncode == 2 and "in the repository, not in the package" in done.stderr

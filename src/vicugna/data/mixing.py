"""One stream out of many sources: weighted, exactly resumable, the same for any number of ranks."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date as Date
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from vicugna import files
from vicugna.data.cache import open_tokens
from vicugna.data.packing import Batch, FileRows, Row, collate
from vicugna.data.procedural import TaskRows, as_text, draw_item
from vicugna.data.records import plain_texts
from vicugna.data.sources import TASK, SourceSpec, documents, parse_specs
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

Rows = FileRows | TaskRows


def schedule(weights: Sequence[float], cycle: int = 1 << 12) -> np.ndarray:
    """Which source gives each row of a cycle, int [cycle]. None is ever a whole row ahead of or
    behind its share (rounded to the cycle, at least one row). Source: Tijdeman 1980, "The chairman
    assignment problem"."""
    ideal = np.asarray(weights, np.float64) / np.sum(weights) * cycle
    counts = np.maximum(1, np.floor(ideal))
    while counts.sum() < cycle:
        counts[np.argmax(ideal - counts)] += 1
    while counts.sum() > cycle:
        counts[np.argmax(np.where(counts > 1, counts - ideal, -np.inf))] -= 1
    shares, given = counts / cycle, np.zeros(len(counts))
    least = 1 / (2 * len(counts) - 2) if len(counts) > 1 else 0.0
    order = np.empty(cycle, np.int64)
    for slot in range(cycle):
        behind = shares * (slot + 1) - given
        deadline = np.where(behind > least - 1e-9, (1 - least - behind) / shares, np.inf)
        order[slot] = source = int(np.argmin(deadline))
        given[source] += 1
    return order


class Stream:
    """The mixed stream; row r and step s are pure functions of the stream's digest and r or s."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], digest: str,
                 plain_text: Sequence[str] = ()) -> None:
        self.digest, self.sources, self._order = digest, list(sources), schedule(weights)
        self.plain_text = list(plain_text)  # sources that are no chats
        chosen = self._order[:, None] == np.arange(len(sources))
        self._per_cycle, self._before = chosen.sum(0), chosen.cumsum(0) - chosen

    def place(self, row: int) -> tuple[int, int]:
        """(source, that source's row) behind row `row` of the stream."""
        cycle, slot = divmod(row, len(self._order))
        source = int(self._order[slot])
        return source, cycle * int(self._per_cycle[source]) + int(self._before[slot, source])

    def row(self, row: int) -> Row:
        """Row `row` of the stream."""
        source, k = self.place(row)
        return self.sources[source].row(k)

    def batch(self, step: int, batch_rows: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's share of rows [step*batch_rows, (step+1)*batch_rows), in order. Raises
        VicugnaError when the ranks cannot share `batch_rows` evenly."""
        if batch_rows % world:
            raise VicugnaError(f"{batch_rows} rows cannot be shared by {world} processes",
                               "batch_rows", "Use a multiple of the number of processes")
        share = batch_rows // world
        first = step * batch_rows + rank * share
        return collate([self.row(row) for row in range(first, first + share)])

    def batches(self, start: int, batch_rows: int, rank: int = 0, world: int = 1
                ) -> Iterator[Batch]:
        """Endless batches from step `start` on, each made while the one before it is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="data") as worker:
            coming = worker.submit(self.batch, start, batch_rows, rank, world)
            for step in count(start + 1):
                batch = coming.result()
                coming = worker.submit(self.batch, step, batch_rows, rank, world)
                yield batch


def open_stream(specs: Sequence[str | dict[str, Any] | SourceSpec], tokenizer: Tokenizer,
                seq_len: int, seed: int, cache_folder: str | Path, split: str = "train",
                pad: int | None = None, date: Date | None = None) -> Stream:
    """A stream of rows of `seq_len` + 1 tokens from a recipe's sources, filled up with `pad`, by
    default the tokenizer's.

    Files are tokenised into `cache_folder` once. `split` is train or dev (every 50th document, and
    the tasks' dev items); a source with too little held out has no share in dev. `date` is what
    chat templates take for today; None is the clock's. Raises
    VicugnaError, naming file and line, for what cannot be read, and when nothing is in `split`.
    """
    sources: list[Rows] = []
    weights, plain_text = [], []
    pad = tokenizer.pad_id if pad is None else pad
    for index, spec in enumerate(parse_specs(specs)):
        own_seed = int(files.digest_of([seed, index])[:12], 16)
        if spec.source.startswith(TASK):
            rows: Rows = TaskRows(spec, tokenizer, seq_len, own_seed, split, pad, date)
        else:
            tokens = open_tokens(spec, tokenizer, Path(cache_folder), date)
            every = np.arange(len(tokens.offsets) - 1)
            own = every[(every % 50 == 49) == (split == "dev")]
            lengths = np.diff(tokens.offsets)[own]
            enough = lengths.sum() > seq_len if tokens.mask is None else any(lengths <= seq_len + 1)
            if split == "dev" and not enough:
                continue
            rows = FileRows(tokens, seq_len, own_seed, pad, spec.source, own)
            plain_text += [spec.source] if tokens.mask is None else []
        sources.append(rows)
        weights.append(spec.weight)
    if not sources:
        raise VicugnaError("no source is large enough to hold out documents", "sources",
                           "Add data, or set validation_rows to 0")
    shares = [[rows.digest, weight] for rows, weight in zip(sources, weights, strict=True)]
    return Stream(sources, weights, files.digest_of([seed, seq_len, split, shares]), plain_text)


def texts(specs: Sequence[str | dict[str, Any] | SourceSpec], limit_bytes: int = 16_000_000
          ) -> Iterator[str]:
    """About `limit_bytes` of text from the sources, by weight and without the form of chats, to
    learn a tokenizer from."""
    parsed = parse_specs(specs)
    total = sum(spec.weight for spec in parsed)
    for spec in parsed:
        left = limit_bytes * spec.weight / total
        every = ((as_text(draw_item(spec, "train", 0, k, 0)) for k in count())
                 if spec.source.startswith(TASK) else
                 chain.from_iterable(map(plain_texts, documents(spec))))
        for text in every:
            yield text[:int(left) + 1]
            left -= len(text.encode())
            if left <= 0:
                break

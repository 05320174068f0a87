"""One stream out of many sources: weighted, exactly resumable, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vicugna import files
from vicugna.data.cache import open_tokens
from vicugna.data.packing import Batch, ChatRows, Row, Rows, TextRows, collate, held_out
from vicugna.data.procedural import TaskRows, as_text, draw_item
from vicugna.data.sources import TASK, SourceSpec, parse_specs, plain_texts
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

_CYCLE = 1 << 12


def schedule(weights: Sequence[float], cycle: int = _CYCLE) -> np.ndarray:
    """Which source gives each row of a cycle, int [cycle]: any prefix is close to the weights.

    No source is ever a whole row ahead of or behind its share (rounded to the cycle, at least one
    row). Source: Tijdeman 1980, "The chairman assignment problem".
    """
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

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], digest: str) -> None:
        self.digest, self.sources = digest, list(sources)
        self._order = schedule(weights)
        self._counts = np.bincount(self._order, minlength=len(sources))
        self._rank_in_source = np.empty(len(self._order), np.int64)
        for source in range(len(sources)):
            places = np.flatnonzero(self._order == source)
            self._rank_in_source[places] = np.arange(len(places))

    def place(self, row: int) -> tuple[int, int]:
        """(source, that source's row) behind row `row` of the stream."""
        cycle, slot = divmod(row, len(self._order))
        source = int(self._order[slot])
        return source, cycle * int(self._counts[source]) + int(self._rank_in_source[slot])

    def row(self, row: int) -> Row:
        """Row `row` of the stream: from one source, its documents packed and masked."""
        source, k = self.place(row)
        return self.sources[source].row(k)

    def batch(self, step: int, batch_rows: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's share of step `step`: rows [step*batch_rows, (step+1)*batch_rows) in order.

        Raises VicugnaError when the ranks cannot share `batch_rows` evenly.
        """
        if batch_rows % world:
            raise VicugnaError(f"{batch_rows} rows cannot be shared by {world} processes",
                               "batch_rows", "Use a multiple of the number of processes")
        share = batch_rows // world
        first = step * batch_rows + rank * share
        return collate([self.row(first + i) for i in range(share)])

    def batches(self, start_step: int, batch_rows: int, rank: int = 0, world: int = 1
                ) -> Iterator[Batch]:
        """Endless batches from `start_step` on, each made while the one before it is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="data") as worker:
            step = start_step
            coming = worker.submit(self.batch, step, batch_rows, rank, world)
            while True:
                batch = coming.result()
                step += 1
                coming = worker.submit(self.batch, step, batch_rows, rank, world)
                yield batch


def open_stream(specs: Sequence[str | dict[str, Any] | SourceSpec], tokenizer: Tokenizer,
                seq_len: int, seed: int, cache_folder: str | Path, split: str = "train") -> Stream:
    """A stream of rows of `seq_len` + 1 tokens from a recipe's sources.

    File sources are tokenised into `cache_folder` once. `split` is train or dev: no row of one is
    ever a row of the other. A source too small to hold documents out has no share in dev. Raises
    VicugnaError for any source that cannot be read, naming the file and line, and when no source
    has anything in `split`.
    """
    sources: list[Rows] = []
    weights: list[float] = []
    for index, spec in enumerate(parse_specs(specs)):
        own_seed = int(files.digest_of([seed, index])[:12], 16)
        if spec.source.startswith(TASK):
            rows: Rows = TaskRows(spec, tokenizer, seq_len, own_seed, split)
        else:
            tokens = open_tokens(spec, tokenizer, Path(cache_folder))
            documents = held_out(len(tokens.offsets) - 1, split)
            held = np.diff(tokens.offsets)[documents]
            chats = tokens.mask is not None  # they are never cut, texts are
            if split == "dev" and not ((held <= seq_len + 1).any() if chats else
                                       held.sum() > seq_len):
                continue
            rows = (TextRows(tokens, seq_len, own_seed, spec.source, documents)
                    if tokens.mask is None else
                    ChatRows(tokens, seq_len, own_seed, tokenizer.pad_id, spec.source, documents))
        sources.append(rows)
        weights.append(spec.weight)
    if not sources:
        raise VicugnaError("no source is large enough to hold out documents", "sources",
                           "Add data, or set validation_rows to 0")
    digest = files.digest_of([seed, seq_len, split, [
        [rows.digest, weight] for rows, weight in zip(sources, weights, strict=True)]])
    return Stream(sources, weights, digest)


def texts(specs: Sequence[str | dict[str, Any] | SourceSpec], limit_bytes: int = 16_000_000
          ) -> Iterator[str]:
    """About `limit_bytes` of text from the sources, by weight, to learn a tokenizer from."""
    parsed = parse_specs(specs)
    total = sum(spec.weight for spec in parsed)
    for spec in parsed:
        left = limit_bytes * spec.weight / total
        every = (plain_texts(spec) if not spec.source.startswith(TASK) else
                 (as_text(draw_item(spec, "train", 0, k, 0)) for k in count()))
        for text in every:
            yield text[:int(left) + 1]
            left -= len(text.encode())
            if left <= 0:
                break

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import data, tasks
from vicugna.chat import encode_training
from vicugna.data import Stream
from vicugna.data.mixing import schedule
from vicugna.data.packing import Row, pack
from vicugna.data.procedural import draw_item
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

STEPS = {"source": "task:reasoning.steps", "weight": 2, "difficulty": {"depth": [1, 3]}}


def documents_of(row: Row) -> list[list[int]]:
    """The row cut where positions restart."""
    cuts = np.flatnonzero(row.positions == 0)
    return [part.tolist() for part in np.split(row.tokens, cuts)[1:]]


def write_texts(n: int = 40) -> list[str]:
    texts = [f"Document {i}. " + "word " * (i % 17) for i in range(n)]
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return texts


def write_chats(n: int = 60, longest: int = 20) -> list[list[dict[str, str]]]:
    chats = [[{"role": "user", "content": f"q{i} " * (i % longest)},
              {"role": "assistant", "content": f"answer {i}", "reasoning": "so " * (i % 5)}]
             for i in range(n)]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in chats))
    return chats


def opened(tok: Tokenizer, *specs: Any, seq_len: int = 64, seed: int = 0) -> Stream:
    return data.open_stream(list(specs), tok, seq_len, seed, "cache")


def test_text_windows_cover_an_epoch_once(tok: Tokenizer) -> None:
    texts = write_texts()
    stream = opened(tok, "texts.jsonl", seq_len=50)
    total = sum(len(tok.encode(t)) + 2 for t in texts)
    n = (total - 1) // 50
    for epoch in (0, 1):
        rows = [stream.row(epoch * n + i) for i in range(n)]
        first = [row.tokens[0] for row in rows]
        targets = sum(len(row.tokens) - 1 for row in rows)
        assert targets <= total - 1 < targets + 50 and len(first) == n
        seen = Counter(part[0] == tok.bos_id for row in rows for part in documents_of(row))
        assert len(texts) - 15 < seen[True] <= len(texts) + n
    assert any((stream.row(i).tokens != stream.row(n + i).tokens).any() for i in range(n))


def test_text_rows_are_whole_documents_with_positions_and_masks(tok: Tokenizer) -> None:
    texts = write_texts()
    known = [[tok.bos_id, *tok.encode(t), tok.eos_ids[0]] for t in texts]
    stream = opened(tok, "texts.jsonl", seq_len=100)
    for k in range(12):
        row = stream.row(k)
        assert row.tokens.dtype == row.positions.dtype == np.int32 and len(row.tokens) == 101
        parts = documents_of(row)
        assert all(part in known for part in parts[1:-1])
        assert any(parts[0] == d[len(d) - len(parts[0]):] for d in known)
        assert any(parts[-1] == d[:len(parts[-1])] for d in known)
        # Loss everywhere but on what follows another document.
        assert (row.loss_mask == (row.positions > 0)).all()


def test_a_document_longer_than_many_rows(tok: Tokenizer) -> None:
    Path("long.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
    row = opened(tok, "long.txt", seq_len=32).row(1)
    assert (row.positions == np.arange(33)).all() and row.loss_mask[1:].all()


def test_chat_rows_hold_every_fitting_chat_once_an_epoch(tok: Tokenizer) -> None:
    chats = [encode_training(tok, chat) for n, chat in enumerate(write_chats(longest=6))
             if n % 50 != 49]  # the others are held out
    stream = opened(tok, "chats.jsonl", seq_len=80)
    wanted = Counter(tuple(ids) for ids, _ in chats)
    masks = {tuple(ids): mask for ids, mask in chats}
    k = 0
    for _ in range(2):
        left = wanted.copy()
        while left.total():
            row = stream.row(k)
            k += 1
            start = 0
            for part in documents_of(row):
                span = slice(start, start + len(part))
                if part[0] == tok.pad_id:
                    assert set(part) == {tok.pad_id} and not row.loss_mask[span].any()
                else:
                    left[tuple(part)] -= 1
                    assert row.loss_mask[span].tolist() == masks[tuple(part)]
                start += len(part)
            assert start == 81 and min(left.values()) >= 0
            left = +left


def test_overlong_chats_are_left_out_with_a_warning(tok: Tokenizer,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    chats = [chat for n, chat in enumerate(write_chats()) if n % 50 != 49]  # not held out
    lengths = [len(encode_training(tok, chat)[0]) for chat in chats]
    stream = opened(tok, "chats.jsonl", seq_len=39)
    n = sum(length > 40 for length in lengths)
    assert 0 < n < 59
    assert f"{n} of 59 chats are longer than 40 tokens" in capsys.readouterr().err
    assert all(len(stream.row(k).tokens) == 40 for k in range(50))
    with pytest.raises(VicugnaError, match="every chat is longer"):
        opened(tok, "chats.jsonl", seq_len=5)


def test_corpus_shorter_than_one_sequence(tok: Tokenizer) -> None:
    Path("short.txt").write_text("few words")
    with pytest.raises(VicugnaError, match="fewer than one sequence") as caught:
        opened(tok, "short.txt", seq_len=500)
    assert caught.value.where == "short.txt"


@pytest.mark.parametrize("form", ["chat", "text"])
def test_task_rows_are_whole_training_items(tok: Tokenizer, form: str) -> None:
    stream = opened(tok, {**STEPS, "form": form}, seq_len=200)
    spec = data.parse_specs([{**STEPS, "form": form}])[0]
    row = stream.row(3)
    parts = documents_of(row)
    if parts[-1][0] == tok.pad_id:
        assert not row.loss_mask[-len(parts[-1]):].any()
        parts.pop()
    assert parts and (row.tokens != stream.row(4).tokens).any()
    for j, part in enumerate(parts):
        item = draw_item(spec, "train", stream.sources[0]._seed, 3, j)  # type: ignore[attr-defined]
        assert tasks.split_of(item.seed) == "train" and 1 <= item.difficulty.depth <= 3
        if form == "chat":
            assert part == encode_training(tok, [*item.messages, item.solution])[0]
        else:
            text = tok.decode(part)
            assert item.messages[0]["content"] in text and text.endswith(item.answer)
    if form == "text":
        body = slice(0, sum(map(len, parts)))
        assert (row.loss_mask[body] == (row.positions[body] > 0)).all()


@pytest.mark.parametrize("task", sorted(t for t in tasks.TASKS if t.startswith("retrieval.")))
def test_length_in_tokens_is_met_and_fits(tok: Tokenizer, task: str) -> None:
    stream = opened(tok, {"source": f"task:{task}", "difficulty": {"length_tokens": 300}},
                    seq_len=320)
    lengths = []
    for k in range(10):
        parts = [p for p in documents_of(stream.row(k)) if p[0] == tok.bos_id]
        assert all(p[-1] == tok.eos_ids[1] for p in parts)
        lengths.append(len(parts[0]))
    assert max(lengths) <= 321 and 240 < np.mean(lengths) < 321


def test_items_that_never_fit_are_an_error(tok: Tokenizer) -> None:
    with pytest.raises(VicugnaError, match="longer than 9 tokens"):
        opened(tok, STEPS, seq_len=8).row(0)
    with pytest.raises(VicugnaError, match="length_tokens is 500"):
        opened(tok, {"source": "task:retrieval.single",
                     "difficulty": {"length_tokens": [500, 900]}})


def test_pack_marks_the_first_token_and_the_pads() -> None:
    ones = np.ones(3, np.bool_)
    row = pack([(np.arange(3), ones), (np.arange(3), ones)], 9, 7)
    assert row.tokens.tolist() == [0, 1, 2, 0, 1, 2, 7, 7, 7]
    assert row.positions.tolist() == [0, 1, 2] * 3
    assert row.loss_mask.tolist() == [False, True, True] * 2 + [False] * 3


def mixed(tok: Tokenizer, seed: int = 0) -> Stream:
    write_texts()
    write_chats()
    return opened(tok, "texts.jsonl", {"source": "chats.jsonl", "weight": 0.5}, STEPS, seed=seed)


def same(a: data.Batch, b: data.Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name))
               for name in ("tokens_BT", "targets_BT", "positions_BT", "weights_BT"))


def test_batches_are_shifted_rows(tok: Tokenizer) -> None:
    stream = mixed(tok)
    batch = stream.batch(2, 6)
    for i in range(6):
        row = stream.row(12 + i)
        assert batch.tokens_BT[i].tolist() == row.tokens[:-1].tolist()
        assert batch.positions_BT[i].tolist() == row.positions[:-1].tolist()
        assert batch.targets_BT[i].tolist() == row.tokens[1:].tolist()
        assert batch.weights_BT[i].tolist() == row.loss_mask[1:].tolist()
    assert batch.tokens_BT.dtype == torch.long and batch.tokens_BT.shape == (6, 64)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_sees(tok: Tokenizer, world: int) -> None:
    stream, whole = mixed(tok), mixed(tok).batch(5, 6)
    shares = [stream.batch(5, 6, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([s.tokens_BT for s in shares]), whole.tokens_BT)
    assert torch.equal(torch.cat([s.targets_BT for s in shares]), whole.targets_BT)
    assert torch.equal(torch.cat([s.weights_BT for s in shares]), whole.weights_BT)
    with pytest.raises(VicugnaError, match="cannot be shared by 4"):
        stream.batch(0, 6, 0, 4)


def test_resuming_gives_the_same_batches(tok: Tokenizer) -> None:
    stream = mixed(tok)
    undisturbed = [stream.batch(step, 4) for step in range(40)]
    fresh = mixed(tok)
    assert fresh.digest == stream.digest
    assert all(same(fresh.batch(step, 4), undisturbed[step]) for step in (39, 0, 17))
    coming = mixed(tok).batches(20, 4)
    assert all(same(next(coming), undisturbed[step]) for step in range(20, 40))
    coming.close()  # type: ignore[attr-defined]


def test_prefetching_passes_errors_on(tok: Tokenizer) -> None:
    with pytest.raises(VicugnaError, match="longer than"):
        next(opened(tok, STEPS, seq_len=8).batches(0, 2))


def test_seed_and_content_decide(tok: Tokenizer) -> None:
    one = mixed(tok)
    assert not same(one.batch(0, 8), mixed(tok, seed=1).batch(0, 8))
    assert one.digest != mixed(tok, seed=1).digest
    before = opened(tok, "texts.jsonl").digest
    write_texts(41)
    assert opened(tok, "texts.jsonl").digest != before


def test_another_process_sees_the_same(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save("tokenizer")
    write_texts()
    write_chats()
    program = ("from vicugna import data, tokenizer; import hashlib;"
               "s = data.open_stream(['texts.jsonl', 'chats.jsonl', 'task:reasoning.steps'],"
               "tokenizer.Tokenizer('tokenizer'), 64, 0, 'cache-' + __import__('sys').argv[1]);"
               "print(hashlib.sha256(s.batch(7, 12).tokens_BT.numpy().tobytes()).hexdigest())")
    outputs = {subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True,
                              check=True, env={"PYTHONPATH": str(Path(data.__file__).parents[2]),
                                               "PYTHONHASHSEED": name}).stdout
               for name in ("1", "2")}
    assert len(outputs) == 1 and len(outputs.pop()) == 65


def test_the_cache_is_used_and_small(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts()
    opened(tok, "texts.jsonl")
    [left] = [path / ".tokens.killed_1.tmp" for path in Path("cache").iterdir()]
    left.mkdir()
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    opened(tok, "texts.jsonl", seed=3)
    assert not left.exists()
    [folder] = Path("cache").glob("*/tokens")
    info = json.loads((folder / "info.json").read_text())
    assert (folder / "tokens.bin").stat().st_size == 2 * info["tokens"]
    (folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(VicugnaError, match="wrong size"):
        opened(tok, "texts.jsonl")


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_every_prefix_of_the_schedule_is_close_to_the_weights(weights: list[float]) -> None:
    order = schedule(weights)
    counts = np.bincount(order, minlength=len(weights))
    assert counts.min() >= 1
    ideal = np.asarray(weights) / sum(weights) * len(order)
    # Rare sources are rounded up to one row of a cycle, at the others' cost.
    assert (np.abs(counts - ideal) <= 1 + len(weights)).all()
    given_so_far = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    slots = np.arange(1, len(order) + 1)[:, None]
    assert np.abs(given_so_far - counts / len(order) * slots).max() < 1


def test_mixing_proportions_go_on_over_cycles(tok: Tokenizer) -> None:
    stream = mixed(tok)
    places = [stream.place(row) for row in range(10_000)]
    share = Counter(source for source, _ in places)
    assert [round(share[i] / 10_000, 2) for i in range(3)] == [0.29, 0.14, 0.57]
    for source in range(3):  # no row is skipped or repeated
        rows = [k for s, k in places if s == source]
        assert rows == list(range(len(rows)))

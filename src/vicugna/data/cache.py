"""A source's tokens on disk: written once, read through memory maps."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vicugna import files
from vicugna.data.sources import Chat, SourceSpec, Text, content_digest, documents
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

_VERSION = 1
_BATCH = 1 << 20  # characters encoded at a time


@dataclass(frozen=True)
class TokenFile:
    """Document d is tokens[offsets[d]:offsets[d+1]]; `mask` (chats only) says where loss lies."""

    tokens: np.ndarray  # uint16 or uint32 [n]
    offsets: np.ndarray  # int64 [documents + 1]
    mask: np.ndarray | None  # bool [n]
    digest: str


def open_tokens(spec: SourceSpec, tokenizer: Tokenizer, folder: Path) -> TokenFile:
    """The tokens of a source, from `folder` when they are already there.

    A text document is BOS, its tokens, end of text; a chat is what `chat_training` gives.
    """
    digest = files.digest_of([_VERSION, content_digest(spec), tokenizer.digest])
    place = folder / digest[:32] / "tokens"
    with _waiting_lock(place.parent / "lock"):
        files.sweep_temporaries(place.parent)
        if not (place / "info.json").exists():
            with files.replacing_folder(place) as temporary:
                _write(spec, tokenizer, temporary)
    info = files.read_json(place / "info.json")

    def mapped(name: str, dtype: str, count: int) -> np.ndarray:
        path = place / name
        if path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise VicugnaError("a cached file has the wrong size", str(path), "Delete its folder")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    tokens, count = info["tokens"], info["documents"]
    return TokenFile(mapped("tokens.bin", info["dtype"], tokens),
                     mapped("offsets.bin", "int64", count + 1),
                     mapped("mask.bin", "bool", tokens) if info["chat"] else None, digest)


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    """Ranks that start together: one writes, the others wait and read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise files.storage_error(error, path) from error


def _write(spec: SourceSpec, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    chat: bool | None = None
    ends = [0]
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as mask:
        for batch in _batches(spec):
            is_chat = isinstance(batch[0], Chat)
            if chat not in (None, is_chat):
                raise VicugnaError("text and messages are mixed", spec.source,
                                   "Put them in two sources")
            chat = is_chat
            if chat:
                _write_chats(batch, tokenizer, tokens, mask, dtype, ends)
            else:
                _write_texts(batch, tokenizer, tokens, dtype, ends)
    if not ends[1:]:
        raise VicugnaError("there is no text in it", spec.source, "Put some text in it")
    np.asarray(ends, np.int64).tofile(folder / "offsets.bin")
    if not chat:
        (folder / "mask.bin").unlink()
    files.write_json(folder / "info.json", {
        "tokens": ends[-1], "documents": len(ends) - 1, "dtype": dtype.name, "chat": chat})


def _batches(spec: SourceSpec) -> Iterator[list[Text | Chat]]:
    """Documents in lists of one kind and of a few million characters."""
    held: list[Text | Chat] = []
    size = 0
    for document in documents(spec):
        if held and (size > _BATCH or type(held[0]) is not type(document)):
            yield held
            held, size = [], 0
        held.append(document)
        size += len(document.text) if isinstance(document, Text) else 1000
    if held:
        yield held


def _write_texts(batch: list[Text | Chat], tokenizer: Tokenizer, out: BinaryIO,
                 dtype: np.dtype, ends: list[int]) -> None:
    pieces = [piece for piece in batch if isinstance(piece, Text)]
    begins = out.tell() // dtype.itemsize == ends[-1]
    for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces]), strict=True):
        start = [tokenizer.bos_id] if begins else []
        end = [tokenizer.eos_ids[0]] if piece.last else []
        out.write(np.asarray([*start, *ids, *end], dtype).tobytes())
        begins = piece.last
        if piece.last:
            ends.append(out.tell() // dtype.itemsize)


def _write_chats(batch: list[Text | Chat], tokenizer: Tokenizer, out: BinaryIO, out_mask: BinaryIO,
                 dtype: np.dtype, ends: list[int]) -> None:
    for chat in batch:
        assert isinstance(chat, Chat)
        try:
            ids, mask = tokenizer.chat_training(chat.messages, chat.tools)
        except VicugnaError as error:
            raise VicugnaError(error.what, f"{chat.where}, {error.where}", error.fix) from error
        out.write(np.asarray(ids, dtype).tobytes())
        out_mask.write(np.asarray(mask, np.bool_).tobytes())
        ends.append(ends[-1] + len(ids))

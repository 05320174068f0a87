"""A source's tokens on disk: written once, read through memory maps."""

import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date as Date
from itertools import islice
from pathlib import Path

import numpy as np

from vicugna import chat, files
from vicugna.data.records import Chat, Text
from vicugna.data.sources import SourceSpec, content_digest, documents
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

_VERSION = 2
_BATCH = 32  # documents, or parts of long ones, encoded at a time


@dataclass(frozen=True)
class TokenFile:
    """Document d is tokens[offsets[d]:offsets[d+1]]; `mask` is the loss mask (chats only)."""

    tokens: np.ndarray  # uint16 or uint32 [n]
    offsets: np.ndarray  # int64 [documents + 1]
    mask: np.ndarray | None  # bool [n]
    digest: str


def open_tokens(spec: SourceSpec, tokenizer: Tokenizer, folder: Path,
                date: Date | None = None) -> TokenFile:
    """The tokens of a source, from `folder` when they are already there. A text document is BOS,
    its tokens, end of text; a chat is what `chat.encode_training` gives, on `date`."""
    digest = files.digest_of([_VERSION, content_digest(spec), chat.digest(tokenizer, date)])
    place = folder / digest[:32] / "tokens"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of ranks that start together, one writes
            files.sweep_temporaries(place.parent)
            if not (place / "info.json").exists():
                with files.replacing_folder(place) as temporary:
                    _write(spec, tokenizer, temporary, date)
    except OSError as error:
        raise files.storage_error(error, place) from error
    info = files.read_json(place / "info.json")

    def mapped(name: str, dtype: str, count: int) -> np.ndarray:
        path = place / name
        if path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise VicugnaError("a cached file has the wrong size", str(path), "Delete its folder")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    return TokenFile(mapped("tokens.bin", info["dtype"], info["tokens"]),
                     mapped("offsets.bin", "int64", info["documents"] + 1),
                     mapped("mask.bin", "bool", info["tokens"]) if info["chat"] else None, digest)


def _write(spec: SourceSpec, tokenizer: Tokenizer, folder: Path, date: Date | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    kinds: set[type] = set()
    every, count, ends, begins = documents(spec), 0, [0], True
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as mask:
        while batch := list(islice(every, _BATCH)):
            kinds |= set(map(type, batch))
            if len(kinds) > 1:
                raise VicugnaError("text and messages are mixed", spec.source, "Use two sources")
            for ids, loss_mask, last in _encoded(batch, tokenizer, date):
                if begins and Text in kinds:
                    ids = [tokenizer.bos_id, *ids]
                tokens.write(np.asarray(ids, dtype).tobytes())
                mask.write(np.asarray(loss_mask, np.bool_).tobytes())
                count, begins = count + len(ids), last
                if last:
                    ends.append(count)
    if not ends[1:]:
        raise VicugnaError("there is no text in it", spec.source, "Put some text in it")
    np.asarray(ends, np.int64).tofile(folder / "offsets.bin")
    if Text in kinds:
        (folder / "mask.bin").unlink()
    files.write_json(folder / "info.json", {"tokens": ends[-1], "documents": len(ends) - 1,
                                            "dtype": dtype.name, "chat": Chat in kinds})


def _encoded(batch: list[Text | Chat], tokenizer: Tokenizer, date: Date | None
             ) -> Iterator[tuple[list[int], list[bool], bool]]:
    """Tokens (without BOS for texts), loss mask (chats only), and whether the document ends."""
    texts = [one for one in batch if isinstance(one, Text)]
    for text, ids in zip(texts, tokenizer.encode_batch([t.text for t in texts]), strict=True):
        yield [*ids, tokenizer.eos_ids[0]] if text.last else ids, [], text.last
    for one in batch:
        if isinstance(one, Chat):
            try:
                yield *chat.encode_training(tokenizer, one.messages, one.tools, date), True
            except VicugnaError as error:
                raise VicugnaError(error.what, f"{one.where}, {error.where}", error.fix) from error

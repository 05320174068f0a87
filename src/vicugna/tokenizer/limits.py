"""Limits on what an untrusted tokenizer.json makes of a text; the library sets none."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from vicugna import files
from vicugna.errors import VicugnaError

ADDED = 20_000  # tokens beside the vocabulary; Llama 4 has 2,048
GROWTH = 100  # factor by which a text may grow
PARTS = 20_000  # characters of the post-processor; Llama 3's has 1,000
PREFIX = 1000  # characters


def check(raw: tokenizers.Tokenizer) -> None:
    """Raise ValueError for parts that would make a text far longer."""
    if len(raw.get_added_tokens_decoder()) > ADDED:
        raise ValueError(f"more than {ADDED:,} added tokens")
    if raw.post_processor is not None and len(raw.post_processor.__getstate__()) > PARTS:
        raise ValueError("its post_processor is too long")
    for name in ("normalizer", "decoder"):
        part = getattr(raw, name)
        if part is not None and _growth(json.loads(part.__getstate__())) > GROWTH:
            raise ValueError(f"its {name} makes a text more than {GROWTH} times as long")


def _growth(part: Any) -> float:
    """Upper bound of the factor by which a part of tokenizer.json makes a text longer; infinity for
    a prefix that is too long."""
    growth = 1.0
    for inner in part.get("normalizers") or part.get("decoders") or ():
        growth *= _growth(inner)
    if part["type"] == "Replace":
        sought = part["pattern"].get("String", "")  # a Regex may match between any two characters
        growth = max(1.0, len(part["content"]) / len(sought) if sought else
                     1.0 + len(part["content"]))
    return growth if len(part.get("prepend", "")) <= PREFIX else float("inf")


@contextmanager
def library_errors(what: str, path: str | Path, fix: str = "Get the file again"
                   ) -> Iterator[None]:
    """Raise what the library raises over a file, its panics too, as VicugnaErrors."""
    try:
        yield
    except VicugnaError:
        raise
    except BaseException as error:  # a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(path, Path) and path.name == "tokenizer.json":
            files.read_json(path)  # raises a clearer error where it is not JSON
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise VicugnaError(f"{what}: {reason}", str(path), fix) from error


text_errors = partial(library_errors, "the tokenizer fails on this text", "tokenizer.json",
                      "Get the file again, or try another text")

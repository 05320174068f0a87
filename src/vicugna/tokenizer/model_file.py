"""`tokenizer.model` of the models' makers, as the tokenizer.json that means the same.

It has two forms: SentencePiece's (Llama 1 and 2, Mistral, Mixtral) and tiktoken's ranks (Llama 3
and 4). The conversions are those of transformers (convert_slow_tokenizer.py).
"""

import struct
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vicugna import files
from vicugna.errors import VicugnaError

MAX_BYTES = 16 * 10**6  # of a file; Llama 4's has 4 million
MAX_TOKENS = 1 << 19
MAX_LENGTH = 256  # of a token, in characters or bytes; the longest known has 128
VERSIONS = ("3", "3.1", "4")
# GPT-2's table: each byte as a printable character, here from character to byte.
_PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = ({chr(byte): byte for byte in _PLAIN} |
         {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - _PLAIN))})
_CHARACTERS = {byte: character for character, byte in BYTES.items()}
_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LLAMA_4_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of SentencePiece's pieces
Text = TypeVar("Text", str, bytes)


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raise the library's panics, which `except Exception` lets pass, as ValueErrors."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from error
        raise


def read(path: Path, version: str | None, legacy: bool) -> tuple[tokenizers.Tokenizer,
                                                               dict[str, Any]]:
    """The tokenizer in a maker's file, and what tokenizer_config.json says of it. `version` and
    `legacy` are `from_model_file`'s. Raises VicugnaError, within seconds on any file."""
    with files.disk_errors(path):
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    try:
        with panics_caught():
            if size > MAX_BYTES:
                raise ValueError(f"{size:,} bytes are too many")
            if data.startswith(b"\n"):  # the key of the first piece
                return _sentencepiece(data, legacy)
            return _ranks(data, version)
    except VicugnaError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise VicugnaError(f"not a tokenizer: {error}", str(path), "Get the file again") from error


def _sentencepiece(data: bytes, legacy: bool) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """From a ModelProto: pieces 1 (text 1, score 2, kind 3), trainer 2, normalizer 3. The text
    normalization it may name, which no model of these families uses, is left out as transformers
    does. Unless `legacy`, only the very beginning of a text gets a space, not what follows a
    control token."""
    parts: dict[int, list[dict[int, Any]]] = {1: [], 2: [{}], 3: [{}]}
    for number, value in _fields(memoryview(data)):
        if number in parts:
            parts[number].append(dict(_fields(value)))
        if len(parts[1]) > MAX_TOKENS:
            raise ValueError("too many pieces")
    pieces, trainer, normalizer = parts[1], parts[2][-1], parts[3][-1]
    if trainer.get(3) != 2:
        raise ValueError("its model is not byte-pair encoding")
    names = [bytes(piece[1]).decode() for piece in pieces]
    kinds = [piece.get(3, _NORMAL) for piece in pieces]
    scores = [struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces]
    ids = {name: id for id, name in enumerate(names)}
    if len(ids) < len(names):
        raise ValueError("it has the same piece twice")
    # Control tokens are never made of text, nor text of them.
    spelled = {names[id]: id for id in sorted(range(len(names)), key=lambda id: (-scores[id], id))
               if kinds[id] in (_NORMAL, _USER_DEFINED)}
    special = {key: names[id] for key, number, default in (
        ("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1))
        if 0 <= (id := _signed(trainer.get(number, default))) < len(names)}
    raw = tokenizers.Tokenizer(models.BPE(
        ids, list(merges(spelled, lambda left, right: len(left))), fuse_unk=True,
        unk_token=special["unk_token"], byte_fallback=bool(trainer.get(35))))
    prefix = bool(normalizer.get(3, 1))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix
                                              + [normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", prepend_scheme="first" if prefix else "never", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix)
    raw.add_tokens([AddedToken(name, special=kind != _USER_DEFINED, normalized=False)
                    for name, kind in zip(names, kinds, strict=True)
                    if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)])
    return _finished(raw, special, legacy=legacy)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: an int, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        number, at = _varint(message, at) if kind in (0, 2) else ({1: 8, 5: 4}[kind], at)
        if kind == 0:
            yield key >> 3, number
            continue
        end = at + number
        if end > len(message):
            raise ValueError("it is cut off")
        yield key >> 3, message[at:end]
        at = end


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError("a number in it is too long")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def merges(ids: Collection[Text], order: Callable[[Text, Text], Any]
           ) -> Iterator[tuple[Text, Text]]:
    """Every way to make a token of two others: first tokens first, those of one in `order`."""
    for token in ids:
        if len(token) > MAX_LENGTH:
            raise ValueError("it has a token that is too long")
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        yield from sorted([(left, right) for left, right in cuts if left in ids and right in ids],
                          key=lambda pair: order(*pair))


def _ranks(data: bytes, version: str | None) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """From lines of a token in base64 and its rank: of the tokens that are two others together,
    those of lower ranks are made first. The control tokens follow the ranks."""
    lines = [line.split() for line in data.split(b"\n") if line]
    listed = sorted((int(rank), b64decode(token, validate=True)) for token, rank in lines)
    ranks = {token: rank for rank, token in listed}
    if list(ranks.values()) != list(range(len(lines))) or len(lines) > MAX_TOKENS:
        raise ValueError("the ranks of its tokens are not 0, 1, 2, ...")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("it has no token for some byte")
    text = {token: "".join(map(_CHARACTERS.__getitem__, token)) for token in ranks}
    pairs = merges(ranks, lambda left, right: (ranks[left], ranks[right]))
    raw = tokenizers.Tokenizer(models.BPE(
        {text[token]: rank for token, rank in ranks.items()},
        [(text[left], text[right]) for left, right in pairs], ignore_merges=True))
    version = version or ("4" if len(ranks) > 150_000 else "3.1")
    split = _LLAMA_4_SPLIT if version == "4" else _LLAMA_3_SPLIT
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    special = _llama_4_names() if version == "4" else _llama_3_names(version)
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    if pads := [name for name in special if "right_pad" in name]:
        names["pad_token"] = pads[0]
    return _finished(raw, names)


def _llama_3_names(version: str) -> list[str]:
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    if version != "3":
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    others = (f"reserved_special_token_{number}" for number in count())
    return [f"<|{named.get(id) or next(others)}|>" for id in range(256)]


def _llama_4_names() -> list[str]:
    def reserved(kind: str, *numbers: int) -> list[str]:
        return [f"{kind}reserved_special_token_{number}" for number in range(*numbers)]

    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix",
             "header_start", "header_end", "eom", "eot", "step", *reserved("text_post_train_", 6),
             "python_start", "python_end", "finetune_right_pad",
             *reserved("text_post_train_", 8, 69), "image_start", "image_end",
             *reserved("vision_", 2), "tile_x_separator", "tile_y_separator",
             *reserved("vision_", 2, 6), "image", *reserved("vision_", 6, 7), "patch",
             *reserved("vision_", 7, 1048), *reserved("reasoning_", 8),
             "reasoning_thinking_start", "reasoning_thinking_end"]
    return [f"<|{name}|>" for name in [*names, *reserved("", 2048 - len(names))]]


def _finished(raw: tokenizers.Tokenizer, names: dict[str, str], **more: Any
              ) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """With the beginning-of-text token, if any, before every text."""
    if bos := names.get("bos_token"):
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, raw.token_to_id(bos))])
    return raw, {**names, "clean_up_tokenization_spaces": False,
                 "tokenizer_class": "PreTrainedTokenizerFast", **more}

"""The original tokenizer files of each family, as the equivalent tokenizer.json.

They have four forms: SentencePiece's tokenizer.model (Llama 1 and 2, Mistral, Mixtral), one of
tiktoken's ranks (Llama 3 and 4), Mistral's tekken.json (Nemo, Small and later), and vocab.json with
merges.txt (Qwen2). The conversions are those of transformers (convert_slow_tokenizer.py,
integrations/mistral/tokenizer.py, tokenization_qwen2.py) and mistral_common (tekken.py).
"""

import json
import struct
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from vicugna import files
from vicugna.errors import VicugnaError
from vicugna.tokenizer import byte_level
from vicugna.tokenizer.limits import library_errors
from vicugna.tokenizer.settings import Settings

MAX_BYTES = 24 * 10**6  # of a file; Mistral's have 19 million
MAX_TOKENS = 1 << 19
MAX_LENGTH = 256  # of a token, in characters or bytes; the longest known has 128
VERSIONS = ("3", "3.1", "4")
# The first special tokens of a tekken.json that lists none, as those of early versions do.
_TEKKEN_EARLY = ("v1", "v2", "v3", "v7")
_TEKKEN_NAMES = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of SentencePiece's pieces
Text = TypeVar("Text", str, bytes)


def read(path: Path, version: str | None = None, legacy: bool = True
         ) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer in an original file, and its tokenizer_config.json. `version` is
    `from_model_file`'s. `legacy` (SentencePiece only) puts a space before what follows a special
    token as well, as SentencePiece and tokenizer.json of Llama 2 and Mistral do; False is
    transformers' `"legacy": false`. Raises whatever the file makes it, within seconds."""
    data = _content(path)
    if data.startswith(b"\n"):  # the key of the first piece
        return _sentencepiece(data, legacy)
    return _tekken(json.loads(data)) if data.startswith(b"{") else _ranks(data, version)


def read_pair(path: Path, found: Settings) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """As `read`, from vocab.json at `path` and merges.txt beside it, which do not say how text is
    cut into words: the tokenizer_class does. VicugnaError unless it is Qwen2's."""
    kind = found.config.get("tokenizer_class")
    if kind not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise VicugnaError(f"vocab.json and merges.txt of tokenizer_class {str(kind)[:40]!r} are "
                           "not read", str(path), "Only Qwen2Tokenizer's are; add tokenizer.json")
    merges_path = path.with_name("merges.txt")
    with library_errors("not a tokenizer", merges_path):
        lines = _content(merges_path).decode().split("\n")
        pairs = [(left, right) for left, right in (
            line.split() for line in lines if line.strip() and not line.startswith("#version:"))]
    ids = json.loads(_content(path))
    if not (isinstance(ids, dict) and {type(id) for id in ids.values()} == {int}):
        raise ValueError("it does not give every token a number")
    if len(set(ids.values())) < len(ids):
        raise ValueError("it has the same id twice")
    if min(ids.values()) < 0 or max(ids.values()) >= MAX_TOKENS:
        raise ValueError(f"its ids are not all between 0 and {MAX_TOKENS:,}")
    if not byte_level.BYTES.keys() <= ids.keys():
        raise ValueError("it has no token for some byte")
    raw = byte_level.build(models.BPE(ids, pairs), byte_level.QWEN_2_SPLIT,
                           found.config.get("add_prefix_space") is True)
    raw.normalizer = normalizers.NFC()
    ending = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return raw, {"bos_token": None, **ending, "clean_up_tokenization_spaces": False}


def _content(path: Path) -> bytes:
    with files.disk_errors(path):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are too many")
        return path.read_bytes()


def _sentencepiece(data: bytes, legacy: bool) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """From a ModelProto: pieces 1 (text 1, score 2, kind 3), trainer 2, normalizer 3. The text
    normalization it may name, which no model of these families uses, is left out as transformers
    does. Unless `legacy`, only the very beginning of a text gets a space, not what follows a
    special token."""
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
    # Special tokens are never made of text, nor text of them.
    spelled = {names[id]: id for id in sorted(range(len(names)), key=lambda id: (-scores[id], id))
               if kinds[id] in (_NORMAL, _USER_DEFINED)}
    special = {key: names[id] for key, number, default in (
        ("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1))
        if 0 <= (id := trainer.get(number, default)) < len(names)}  # -1 is 2**64 - 1 in the file
    raw = sentencepiece(ids, spelled, special["unk_token"], bool(normalizer.get(3, 1)),
                        bool(trainer.get(35)), legacy)
    raw.add_tokens([AddedToken(name, special=kind != _USER_DEFINED, normalized=False)
                    for name, kind in zip(names, kinds, strict=True)
                    if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)])
    return _finished(raw, special, legacy=legacy)


def sentencepiece(ids: dict[str, int], spelled: Collection[str], unk_token: str, prefix: bool,
                  byte_fallback: bool = True, legacy: bool = True) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: text is made of the tokens `spelled`, those that stand first are merged
    first. `prefix` puts a space before a text; for `legacy` see `from_model_file`."""
    raw = tokenizers.Tokenizer(models.BPE(
        ids, list(merges(spelled, lambda left, right: len(left))), fuse_unk=True,
        unk_token=unk_token, byte_fallback=byte_fallback))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix
                                              + [normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", prepend_scheme="first" if prefix else "never", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix)
    return raw


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
    those of lower ranks are made first. The special tokens follow the ranks."""
    lines = [line.split() for line in data.split(b"\n") if line]
    listed = sorted((int(rank), b64decode(token, validate=True)) for token, rank in lines)
    ranks = {token: rank for rank, token in listed}
    if [rank for rank, _ in listed] != list(range(len(lines))):
        raise ValueError("the ranks of its tokens are not 0, 1, 2, ...")
    version = version or ("4" if len(ranks) > 150_000 else "3.1")
    raw = _of_ranks(ranks, [], byte_level.LLAMA_4_SPLIT if version == "4" else
                    byte_level.LLAMA_3_SPLIT)
    special = _llama_4_names() if version == "4" else _llama_3_names(version)
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    if pads := [name for name in special if "right_pad" in name]:
        names["pad_token"] = pads[0]
    return _finished(raw, names)


def _tekken(content: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """From tekken.json: special tokens come first, and leave of the ranked tokens as many as
    `default_vocab_size` has room for."""
    config, listed = content["config"], content.get("special_tokens")
    size, first = config["default_vocab_size"], config["default_num_special_tokens"]
    ranked = content["vocab"][:max(0, size - first)]
    if listed is None and config["version"] not in _TEKKEN_EARLY:
        raise ValueError("it lists no special tokens")
    special = list(_TEKKEN_NAMES) if listed is None else [
        token["token_str"] for token in sorted(listed, key=lambda token: token["rank"])]
    for entries in (ranked, listed or []):
        if sorted(entry["rank"] for entry in entries) != list(range(len(entries))):
            raise ValueError("the ranks of its tokens are not 0, 1, 2, ...")
    if first + len(ranked) != size or not len(special) <= first <= MAX_TOKENS:
        raise ValueError("the numbers of tokens in it contradict each other")
    special += [f"<SPECIAL_{id}>" for id in range(len(special), first)]
    raw = _of_ranks({b64decode(entry["token_bytes"], validate=True): entry["rank"]
                     for entry in ranked}, special, config["pattern"])
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _finished(raw, {key: name for key, name in names.items() if name in special})


def _of_ranks(ranks: dict[bytes, int], special: list[str], split: str) -> tokenizers.Tokenizer:
    """Byte-level BPE of tokens by rank, whose ids follow those of the `special` ones."""
    first = len(special)
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("it has no token for some byte")
    text = {token: "".join(map(byte_level.CHARACTERS.__getitem__, token)) for token in ranks}
    ids = {name: id for id, name in enumerate(special)} | {
        text[token]: first + rank for token, rank in ranks.items()}
    if len(ids) > MAX_TOKENS or set(ids.values()) != set(range(first + len(ranks))):
        raise ValueError("it has too many tokens, or the same one twice")
    pairs = merges(ranks, lambda left, right: (ranks[left], ranks[right]))
    raw = byte_level.build(models.BPE(ids, [(text[a], text[b]) for a, b in pairs]), split)
    raw.model.ignore_merges = True
    return raw


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
        byte_level.prepend_bos(raw, bos)
    return raw, {**names, "clean_up_tokenization_spaces": False,
                 "tokenizer_class": "PreTrainedTokenizerFast", **more}

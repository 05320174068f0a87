"""Tokenizers of all families from their files: text to tokens and back, and the special tokens."""

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from vicugna import files
from vicugna.errors import VicugnaError
from vicugna.tokenizer import limits, model_file, settings
from vicugna.tokenizer.byte_level import BYTES
from vicugna.tokenizer.encoder import Encoder
from vicugna.tokenizer.settings import Settings

# The first that is there is read.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
THINK, END_THINK, END_OF_TURN = "<think>", "</think>", "<|eot_id|>"
END_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>", END_OF_TURN,
              "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>")
MAXIMUM_VOCABULARY = 1 << 22


def valid_unicode(text: str, where: str = "text") -> str:
    """The text itself; VicugnaError when UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VicugnaError(f"half of a surrogate pair at character {error.start}", where,
                           "Give valid Unicode") from error
    return text


def from_model_file(path: str | Path, version: str | None = None) -> "Tokenizer":
    """The tokenizer in `tokenizer.model`, be it SentencePiece's (Llama 1, 2, Mistral) or the ranks
    of tiktoken (Llama 3, 4), or in `tekken.json` (later Mistrals). It has no chat template.

    `version` is "3", "3.1" (3.2 and 3.3 too) or "4": it names the special tokens of ranks, which
    the file does not; None tells 3.1 from 4 by its size. Raises VicugnaError.
    """
    path = Path(path)
    if version not in (None, *model_file.VERSIONS):
        raise VicugnaError(f"there is no version {version!r} of Llama's special tokens", str(path),
                           f"Use one of {', '.join(model_file.VERSIONS)}")
    self = Tokenizer.__new__(Tokenizer)
    with limits.library_errors("not a tokenizer", path):
        raw, config = model_file.read(path, version)
        stops = map(raw.token_to_id, (name for name in END_TOKENS if name.startswith("<|eo")))
        self._set_up("", raw, Settings(config, ids={"eos": [id for id in stops if id is not None]}))
    return self


class Tokenizer:
    """Text to tokens and back, for our own tokenizers and those of other families.

    `special_tokens` are the ids, by name, of the tokens that mark turns, documents, reasoning and
    tool calls: those that the files call special, name (as bos_token), or write in brackets."""

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint's tokenizer: tokenizer.json or, where there is none, the
        original file (see `from_model_file`), with the settings beside it. VicugnaError when
        a file is missing or broken."""
        folder = Path(folder)
        path = next((folder / name for name in FILES if (folder / name).exists()),
                    folder / FILES[0])
        with limits.library_errors("not a tokenizer", path):
            found = settings.read(folder)
            if path.name == FILES[0]:
                self._set_up(files.read_text(path), None, found)
            else:
                raw, config = (
                    model_file.read_pair(path, found) if path.name == "vocab.json" else
                    model_file.read(path, legacy=found.config.get("legacy") is not False))
                self._set_up("", raw, replace(found, config={**config, **found.config}))

    @classmethod
    def of(cls, tokenizer_json: str, config: dict[str, Any], template: str | None) -> "Tokenizer":
        """A tokenizer from the contents of its three files."""
        self = cls.__new__(cls)
        self._set_up(tokenizer_json, None, Settings(
            config, templates={} if template is None else {"default": template}))
        return self

    def _set_up(self, tokenizer_json: str, raw: tokenizers.Tokenizer | None,
                found: Settings) -> None:
        if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', tokenizer_json):
            raise ValueError("a prefix of inner words")  # over which the library may abort
        if tokenizer_json.count('"single_word"') > limits.ADDED:  # seconds before they are read
            raise ValueError(f"more than {limits.ADDED:,} added tokens")
        self._raw = tokenizers.Tokenizer.from_str(tokenizer_json) if raw is None else raw
        self._raw.no_truncation()
        self._raw.no_padding()
        more = list(found.added({t.content for t in self._raw.get_added_tokens_decoder().values()}))
        changed = self._raw.add_tokens(more) if more else 0
        limits.check(self._raw)
        if raw and any(raw.token_to_id(name) != id for name, id in found.added_ids.items()):
            raise ValueError("the files beside it give its added tokens other ids")
        self.json = self._raw.to_str(pretty=True) if changed or raw else tokenizer_json
        self.config, self.templates, self._names_map = (found.config, found.templates,
                                                        found.names_map)
        self.processors = found.processors  # files about images (chat/image_settings.py)
        self.named_tokens = found.names  # such as bos_token, of which a template may speak
        added = self._raw.get_added_tokens_decoder()
        named = set(self.named_tokens.values())
        # Some models mark tokens like <think> as ordinary: for us they are special tokens too.
        self.special_tokens = {
            token.content: id for id, token in sorted(added.items())
            if token.special or token.content in named or re.fullmatch(r"[<\[].*[>\]]",
                                                                       token.content)}
        self.special_ids = frozenset(self.special_tokens.values())
        self.skipped_ids = frozenset(id for id, token in added.items() if token.special)
        decoder = self._raw.decoder
        self._byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self.strips_first_space = bool(decoder and not self._byte_level
                                       and decoder.decode(["▁a"]) == "a")
        self.vocab_size = max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAXIMUM_VOCABULARY:
            raise ValueError(f"an id of {self.vocab_size - 1}")
        self._set_ids(found.ids)

    def _set_ids(self, found: dict[str, list[int]]) -> None:
        given = {kind: [id for id in ids if id < self.vocab_size] for kind, ids in found.items()}
        templates = "".join(self.templates.values())
        ends = [self.named_tokens.get("eos_token", ""),
                *(end for end in END_TOKENS if end in templates)]
        own = [self.special_tokens[name] for name in ends if name in self.special_tokens]
        self.eos_ids = (tuple(dict.fromkeys([*own, *given.get("eos", [])])) or
                        tuple(self.special_tokens[end] for end in END_TOKENS
                              if end in self.special_tokens))
        end = self.eos_ids[0] if self.eos_ids else 0  # stands in for what a tokenizer lacks
        first = [id for id in self._raw.encode("").ids[:1] if id in self.special_ids]
        own_bos = self.special_tokens.get(self.named_tokens.get("bos_token", "<|begin_of_text|>"),
                                          first[0] if first else None)
        self.bos_id = own_bos if own_bos is not None else [*given.get("bos", []), end][0]
        self.pad_id = self.special_tokens.get(self.named_tokens.get("pad_token", ""),
                                              [*given.get("pad", []), end][0])
        adds_bos = first == [own_bos] or (own_bos is not None
                                          and self.config.get("add_bos_token") is True)
        self._prefix = [self.bos_id] if adds_bos else []

    @property
    def template(self) -> str | None:
        """The chat template, if any; the one without tools where there are several."""
        return self.templates.get("default")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over `contents`."""
        return files.digest_of(self.contents)

    @property
    def contents(self) -> dict[str, Any]:
        """What decides tokens: the tokenizer, the names of special tokens, the chat templates."""
        several = self.templates.keys() - {"default"}
        return {"tokenizer": json.loads(self.json), "names": self.named_tokens,
                "template": self.templates if several else self.template}

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face files; each is replaced atomically."""
        folder, config = Path(folder), self.config
        if self.templates.keys() - {"default"}:
            config = {**config, "chat_template": [{"name": name, "template": text}
                                                  for name, text in self.templates.items()]}
        elif self.template is not None:
            files.write_text(folder / "chat_template.jinja", self.template)
        files.write_text(folder / "tokenizer.json", self.json)
        files.write_json(folder / "tokenizer_config.json", config)
        files.write_json(folder / "special_tokens_map.json", self._names_map or self.named_tokens)
        for name, content in self.processors.items():
            files.write_json(folder / name, content)

    def id_of(self, name: str) -> int | None:
        """The id of a special token, or None when there is no such one."""
        return self.special_tokens.get(name)

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes text, of which no part can become a special token but by a placeholder."""
        unknown = self.special_tokens.get(getattr(self._raw.model, "unk_token", None) or "")
        return Encoder(self._raw, self.special_tokens, unknown, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text: no BOS, and never a special token, whatever the text holds."""
        return self.encode_batch([text])[0]

    @limits.text_errors()
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        return self.encoder.encode_batch(list(map(valid_unicode, texts)))

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue: `encode`, after BOS where the checkpoint puts one."""
        return [*self._prefix, *self.encode(text)]

    @cached_property
    def _vocabulary_bytes(self) -> dict[int, bytes]:
        vocabulary = self._raw.get_vocab(with_added_tokens=False)
        added = self._raw.get_added_tokens_decoder()
        return ({id: self._bytes_of(token) for token, id in vocabulary.items()} |
                {id: token.content.encode() for id, token in added.items()})

    def _bytes_of(self, token: str) -> bytes:
        if not self._byte_level:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        try:
            return bytes(map(BYTES.__getitem__, token))
        except KeyError:  # a token which is no text of any byte
            return token.encode()

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens of single bytes that SentencePiece falls back to."""
        names = [] if self._byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        return frozenset(id for id in map(self._raw.token_to_id, names) if id is not None)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; empty for an id that names no token."""
        return self._vocabulary_bytes.get(id, b"")

    @limits.text_errors()
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves out the
        tokens of turns and documents; <think> and tool calls stay visible."""
        shown = [id for id in ids if not (skip_special and id in self.skipped_ids)]
        if self._byte_level:
            return b"".join(map(self.token_bytes, shown)).decode("utf-8", errors="replace")
        return self._raw.decode(shown, skip_special_tokens=False)


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of unfinished characters; the texts
    joined are `Tokenizer.decode`'s. Where single bytes are tokens of SentencePiece, it is a run of
    them that is or is not text, so runs come whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._run = tokenizer, b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none."""
        if id in self._tokenizer.skipped_ids:
            return ""
        data = self._tokenizer.token_bytes(id)
        if id in self._tokenizer.byte_ids:
            self._run += data
            return ""
        return self._stripped(self._whole_run() + self._decoder.decode(data))

    def finish(self) -> str:
        """What is left at the end: U+FFFD when a character was never finished."""
        return self._stripped(self._whole_run() + self._decoder.decode(b"", final=True))

    def _whole_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            text, self._strip_space = text.removeprefix(" "), False
        return text

"""Byte-level BPE: training, the Hugging Face files, and text to tokens and back."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from vicugna import files
from vicugna.errors import VicugnaError
from vicugna.tokenizer.chat import ROLES, TEMPLATE, Message, Renderer
from vicugna.tokenizer.sandbox import Template

BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
THINK, END_THINK = "<think>", "</think>"
# The last four are tokens a reader may see, as in other open models: decoding keeps them.
SPECIAL = (BOS, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN, "<|pad|>")
VISIBLE = (THINK, END_THINK, "<|tool_call|>", "<|/tool_call|>")
ENDINGS = (END_OF_TEXT, "<|endoftext|>", "</s>", END_OF_TURN, "<|eom_id|>", "<|im_end|>")
MINIMUM_VOCABULARY = 256 + len(SPECIAL) + len(VISIBLE)
# Llama 3's split, but with digits one by one.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: each byte as a printable character, here from character to byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of_character()


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of exactly `vocab_size` tokens from `texts`; same texts, same tokenizer.

    Raises VicugnaError when the vocabulary cannot hold the 256 bytes and the special tokens, or
    when the texts are empty or too few to fill it.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise VicugnaError(f"{vocab_size} is too few tokens", "vocab_size",
                           f"Use at least {MINIMUM_VOCABULARY} (256 bytes and special tokens)")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    specials = len(SPECIAL) + len(VISIBLE)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - specials, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # Every turn of every chat holds a role's name: make each of them one token.
    roles = ("\n".join([role] * 1000) for role in ROLES)
    raw.train_from_iterator(chain(_checked(texts), roles), trainer)
    learned = raw.get_vocab_size() + specials
    if learned < vocab_size:
        raise VicugnaError(f"the texts are too few to learn {vocab_size} tokens; they give "
                           f"{learned}", "tokenizer", f"Add text, or set vocab_size to {learned}")
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in VISIBLE])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, raw.token_to_id(BOS))])
    config = {"bos_token": BOS, "eos_token": END_OF_TEXT, "pad_token": "<|pad|>",
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return Tokenizer.of(raw.to_str(pretty=True), config, TEMPLATE)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield _unicode(text)
    if empty:
        raise VicugnaError("there is no text to learn from", "tokenizer", "Give some text")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VicugnaError(f"half of a surrogate pair at character {error.start}", "text",
                           "Give valid Unicode") from error
    return text


class Tokenizer:
    """Text to tokens and back, for our own tokenizers and other Hugging Face ones."""

    eos_ids: tuple[int, ...]

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint's tokenizer; VicugnaError when a file is missing or broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        files.read_json(path)
        config = _read_optional(folder / "tokenizer_config.json")
        generation = _read_optional(folder / "generation_config.json")
        try:
            template = config.pop("chat_template", None)
            if isinstance(template, list):  # an older form: several templates by name
                template = {t["name"]: t["template"] for t in template}.get("default")
            if (folder / "chat_template.jinja").exists():
                template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            self._set_up(path.read_text(encoding="utf-8"), config, template)
        except Exception as error:  # the library raises plain Exception
            raise VicugnaError(f"not a tokenizer: {error}", str(path),
                               "Get the file again") from error
        more = generation.get("eos_token_id")
        extra = more if isinstance(more, list) else [more] if isinstance(more, int) else []
        self.eos_ids = tuple(dict.fromkeys([*self.eos_ids, *extra]))

    @classmethod
    def of(cls, tokenizer_json: str, config: dict[str, Any], template: str | None) -> Tokenizer:
        """A tokenizer from the contents of its three files."""
        self = cls.__new__(cls)
        self._set_up(tokenizer_json, config, template)
        return self

    def _set_up(self, tokenizer_json: str, config: dict[str, Any], template: str | None) -> None:
        self._json, self.config, self.template = tokenizer_json, config, template
        self._raw = tokenizers.Tokenizer.from_str(tokenizer_json)
        added = self._raw.get_added_tokens_decoder()
        # Some models mark tokens like <think> as ordinary: for us they are control tokens too.
        self._controls = {token.content: id for id, token in sorted(added.items())
                          if token.special or re.fullmatch(r"[<\[].*[>\]]", token.content)}
        self._skipped = {id for id, token in added.items() if token.special}
        self._added = {id: token.content for id, token in added.items()}
        content = json.loads(tokenizer_json)
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self._controls
        self._text = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._text.encode_special_tokens = True  # control tokens' names are then plain text
        self._text.no_truncation()
        self._text.no_padding()
        self._byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
        names = sorted(self._controls, key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "(?!)")
        self._short = lru_cache(maxsize=4096)(self._encode)
        self.control_ids = frozenset(self._controls.values())
        self.vocab_size = max(self._raw.get_vocab(with_added_tokens=True).values()) + 1
        self._names = {key: name for key, value in config.items()
                       if key.endswith("_token") and (name := _name(value))}
        endings = [*ENDINGS, self._names.get("eos_token", "")]
        self.eos_ids = tuple(dict.fromkeys(
            self._controls[name] for name in endings if name in self._controls))
        end = self.eos_ids[0] if self.eos_ids else 0  # stands in for what a tokenizer lacks
        self.bos_id = self._controls.get(self._names.get("bos_token", BOS), end)
        self.pad_id = self._controls.get(self._names.get("pad_token", ""), end)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tokenizer, the names of its special tokens and the chat template."""
        return files.digest_of({"tokenizer": json.loads(self._json), "names": self._names,
                                "template": self.template})

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face files; each is replaced atomically."""
        folder = Path(folder)
        files.write_text(folder / "tokenizer.json", self._json)
        files.write_json(folder / "tokenizer_config.json", self.config)
        files.write_json(folder / "special_tokens_map.json", self._names)
        if self.template is not None:
            files.write_text(folder / "chat_template.jinja", self.template)

    def id_of(self, name: str) -> int | None:
        """The id of a control token, or None when there is no such one."""
        return self._controls.get(name)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text: no BOS, and never a control token, whatever the text holds."""
        return self._encode(_unicode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        encodings = self._text.encode_batch_fast(list(map(_unicode, texts)),
                                                 add_special_tokens=False)
        return [self._plain(encoding.ids) for encoding in encodings]

    def _encode(self, text: str) -> list[int]:
        return self._plain(self._text.encode(text, add_special_tokens=False).ids)

    def _plain(self, ids: list[int]) -> list[int]:
        if not self.control_ids.isdisjoint(ids):
            raise VicugnaError("this tokenizer's own merges spell a control token", "text",
                               "Leave the control token's name out of the text")
        return ids

    @cached_property
    def _vocabulary_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, id in self._raw.get_vocab(with_added_tokens=True).items():
            if id in self._added:
                table[id] = self._added[id].encode()
            elif self._byte_level:
                table[id] = bytes(_BYTES[character] for character in token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                table[id] = bytes([int(token[3:5], 16)])
            else:
                table[id] = token.replace("▁", " ").encode()
        return table

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; empty for an id that names no token."""
        return self._vocabulary_bytes[id] if 0 <= id < self.vocab_size else b""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out the tokens of turns and documents; <think> and tool calls
        stay visible.
        """
        kept = [id for id in ids if not (skip_special and id in self._skipped)]
        if self._byte_level:
            return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return self._raw.decode(kept, skip_special_tokens=False)

    def split_reasoning(self, ids: Iterable[int]) -> tuple[str | None, str]:
        """A reply's tokens as (reasoning or None, answer).

        Reasoning that never ends leaves an empty answer.
        """
        ids = list(ids)
        start, end = self.id_of(THINK), self.id_of(END_THINK)
        if end in ids:
            cut = ids.index(end)
            return (self.decode(i for i in ids[:cut] if i != start), self.decode(ids[cut + 1:]))
        if start in ids:
            return self.decode(i for i in ids if i != start), ""
        return None, self.decode(ids)

    def chat(self, messages: list[Message], add_generation_prompt: bool = True,
             tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Tokens of a chat, BOS included. Only the template can place control tokens.

        `messages` are {"role": "system|user|assistant|tool", "content": text}, an assistant's
        optionally with "reasoning" and "tool_calls". Raises VicugnaError for anything else.
        """
        renderer = self._renderer(messages, tools)
        text = renderer.text(add_generation_prompt=add_generation_prompt)
        return self._marked(text, renderer)

    def chat_training(self, messages: list[Message], tools: list[dict[str, Any]] | None = None
                      ) -> tuple[list[int], list[bool]]:
        """Tokens of a finished chat, and which of them the assistant said, its end of turn too.

        The assistant's tokens are those it would have to generate after the same prompt.
        """
        renderer = self._renderer(messages, tools)
        text = renderer.text()
        tokens: list[int] = []
        mask: list[bool] = []
        done = 0
        for start in renderer.starts(text):
            end = next((m.end() for m in self._marks.finditer(text, start)
                        if self._controls[m.group()] in self.eos_ids), len(text))
            for piece, said in ((text[done:start], False), (text[start:end], True)):
                tokens += (ids := self._marked(piece, renderer))
                mask += [said] * len(ids)
            done = end
        tokens += (ids := self._marked(text[done:], renderer))
        return tokens, mask + [False] * len(ids)

    @cached_property
    def _compiled(self) -> Template:
        if self.template is None:
            raise VicugnaError("this tokenizer has no chat template", "chat_template.jinja",
                               "Use plain text, or add a template to the checkpoint")
        return Template(self.template)

    def _renderer(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Renderer:
        return Renderer(self._compiled, self._names, list(self._controls), messages, tools)

    def _marked(self, text: str, renderer: Renderer) -> list[int]:
        """Tokens of rendered text: control tokens where the template put them, else plain."""
        tokens: list[int] = []
        for index, piece in enumerate(self._marks.split(text)):
            if index % 2:
                tokens.append(self._controls[piece])
            elif piece:
                plain = _unicode(renderer.veil.lift(piece))
                tokens += self._short(plain) if len(plain) <= 64 else self._encode(plain)
        return tokens


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of unfinished characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none."""
        if self._skip and id in self._tokenizer._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD when a character was never finished."""
        return self._decoder.decode(b"", final=True)


def _name(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _read_optional(path: Path) -> dict[str, Any]:
    content = files.read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise VicugnaError("not a JSON object", str(path), "Get the file again")
    return content

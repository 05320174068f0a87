"""Byte-level BPE: training, the Hugging Face files, and text to tokens and back."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import chain, pairwise
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
# GPT-2's table: each byte as a printable character, here from character to byte.
_PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTES = ({chr(byte): byte for byte in _PLAIN} |
          {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - _PLAIN))})


def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn a tokenizer of exactly `vocab_size` tokens from `texts`; same texts, same tokenizer.

    Raises VicugnaError for too small a vocabulary, and for texts that are too few to fill it.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise VicugnaError(f"{vocab_size} is too few tokens", "vocab_size",
                           f"Use at least {MINIMUM_VOCABULARY} (256 bytes and special tokens)")
    given = map(valid_unicode, filter(None, texts))
    first = next(given, None)
    if first is None:
        raise VicugnaError("there is no text to learn from", "tokenizer", "Give some text")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=name in SPECIAL, normalized=False)
                for name in (*SPECIAL, *VISIBLE)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials), min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # Every turn of every chat holds a role's name: make each of them one token.
    roles = ("\n".join([role] * 1000) for role in ROLES)
    raw.train_from_iterator(chain([first], given, roles), trainer)
    learned = raw.get_vocab_size() + len(specials)
    if learned < vocab_size:
        raise VicugnaError(f"the texts are too few to learn {vocab_size} tokens; they give "
                           f"{learned}", "tokenizer", f"Add text, or set vocab_size to {learned}")
    raw.add_tokens(specials)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, raw.token_to_id(BOS))])
    config = {"bos_token": BOS, "eos_token": END_OF_TEXT, "pad_token": "<|pad|>",
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return Tokenizer.of(raw.to_str(pretty=True), config, TEMPLATE)


def valid_unicode(text: str, where: str = "text") -> str:
    """The text itself; VicugnaError when UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VicugnaError(f"half of a surrogate pair at character {error.start}", where,
                           "Give valid Unicode") from error
    return text


class Tokenizer:
    """Text to tokens and back, for our own tokenizers and other Hugging Face ones."""

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint's tokenizer; VicugnaError when a file is missing or broken."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        files.read_json(path)
        config = _read_optional(folder / "tokenizer_config.json")
        more = _read_optional(folder / "generation_config.json").get("eos_token_id")
        endings = more if isinstance(more, list) else [more] if isinstance(more, int) else []
        try:
            template = config.pop("chat_template", None)
            if isinstance(template, list):  # an older form: several templates by name
                template = {t["name"]: t["template"] for t in template}.get("default")
            if (folder / "chat_template.jinja").exists():
                template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            self._set_up(path.read_text(encoding="utf-8"), config, template, endings)
        except Exception as error:  # the library raises plain Exception
            raise VicugnaError(f"not a tokenizer: {error}", str(path), "Get it again") from error

    @classmethod
    def of(cls, tokenizer_json: str, config: dict[str, Any], template: str | None) -> "Tokenizer":
        """A tokenizer from the contents of its three files."""
        self = cls.__new__(cls)
        self._set_up(tokenizer_json, config, template, [])
        return self

    def _set_up(self, tokenizer_json: str, config: dict[str, Any], template: str | None,
                more_endings: list[int]) -> None:
        self._json, self.config, self.template = tokenizer_json, config, template
        self._raw = tokenizers.Tokenizer.from_str(tokenizer_json)
        added = self._raw.get_added_tokens_decoder()
        # Some models mark tokens like <think> as ordinary: for us they are control tokens too.
        self._controls = {token.content: id for id, token in sorted(added.items())
                          if token.special or re.fullmatch(r"[<\[].*[>\]]", token.content)}
        self._skipped = {id for id, token in added.items() if token.special}
        content = json.loads(tokenizer_json)
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self._controls
        content["truncation"] = content["padding"] = None
        self._text = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._text.encode_special_tokens = True  # control tokens' names are then plain text
        self._byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
        names = sorted(self._controls, key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "(?!)")
        self._short = lru_cache(maxsize=4096)(self.encode)
        self.control_ids = frozenset(self._controls.values())
        self.vocab_size = max(self._raw.get_vocab(with_added_tokens=True).values()) + 1
        named = {key: value.get("content") if isinstance(value, dict) else value
                 for key, value in config.items() if key.endswith("_token")}
        self._names = {key: name for key, name in named.items() if name and isinstance(name, str)}
        endings = [*ENDINGS, self._names.get("eos_token", "")]
        own = [self._controls[name] for name in endings if name in self._controls]
        self.eos_ids = tuple(dict.fromkeys([*own, *more_endings]))
        end = own[0] if own else 0  # stands in for what a tokenizer lacks
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
        return self._plain(self._text.encode(valid_unicode(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        valid = list(map(valid_unicode, texts))
        whole = self._text.encode_batch_fast(valid, add_special_tokens=False)
        return [self._plain(encoding.ids) for encoding in whole]

    def _plain(self, ids: list[int]) -> list[int]:
        if not self.control_ids.isdisjoint(ids):
            raise VicugnaError("this tokenizer's own merges spell a control token", "text",
                               "Leave the control token's name out of the text")
        return ids

    @cached_property
    def _vocabulary_bytes(self) -> dict[int, bytes]:
        added = self._raw.get_added_tokens_decoder()
        table = {id: token.content.encode() for id, token in added.items()}
        for token, id in self._raw.get_vocab(with_added_tokens=False).items():
            if id not in added:
                byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
                table[id] = (bytes(map(_BYTES.__getitem__, token)) if self._byte_level else
                             bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode())
        return table

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; empty for an id that names no token."""
        return self._vocabulary_bytes.get(id, b"")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves out the
        tokens of turns and documents; <think> and tool calls stay visible."""
        kept = [id for id in ids if not (skip_special and id in self._skipped)]
        if self._byte_level:
            return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return self._raw.decode(kept, skip_special_tokens=False)

    def split_reasoning(self, ids: Iterable[int]) -> tuple[str | None, str]:
        """A reply's tokens as (reasoning or None, answer); the answer is "" if it never ends."""
        ids = list(ids)
        start, end = self.id_of(THINK), self.id_of(END_THINK)
        if start not in ids and end not in ids:
            return None, self.decode(ids)
        cut = ids.index(end) if end in ids else len(ids)
        return self.decode(i for i in ids[:cut] if i != start), self.decode(ids[cut + 1:])

    def chat(self, messages: list[Message], add_generation_prompt: bool = True,
             tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Tokens of a chat, BOS included. Only the template can place control tokens. `messages`
        are {"role": "system|user|assistant|tool", "content": text}, an assistant's optionally with
        "reasoning" and "tool_calls". Raises VicugnaError for anything else."""
        renderer = Renderer(self._compiled, self._names, self._controls, messages, tools)
        return self._marked(renderer.text(prompt=add_generation_prompt), renderer)

    def chat_training(self, messages: list[Message], tools: list[dict[str, Any]] | None = None
                      ) -> tuple[list[int], list[bool]]:
        """Tokens of a finished chat, and which of them the assistant would have to generate after
        the same prompt, its end of turn too."""
        renderer = Renderer(self._compiled, self._names, self._controls, messages, tools)
        text = renderer.text()
        cuts = [0]
        for start in renderer.starts(text):
            cuts += [start, next((mark.end() for mark in self._marks.finditer(text, start)
                                  if self._controls[mark.group()] in self.eos_ids), len(text))]
        tokens: list[int] = []
        mask: list[bool] = []
        for number, (start, end) in enumerate(pairwise([*cuts, len(text)])):
            tokens += (ids := self._marked(text[start:end], renderer))
            mask += [number % 2 == 1] * len(ids)
        return tokens, mask

    @cached_property
    def _compiled(self) -> Template:
        if self.template is None:
            raise VicugnaError("this tokenizer has no chat template", "chat_template.jinja",
                               "Use plain text, or add a template to the checkpoint")
        return Template(self.template)

    def _marked(self, text: str, renderer: Renderer) -> list[int]:
        """Tokens of rendered text: control tokens where the template put them, else plain."""
        tokens: list[int] = []
        for index, piece in enumerate(self._marks.split(text)):
            if index % 2:
                tokens.append(self._controls[piece])
            elif piece:
                plain = renderer.lift(piece)
                tokens += self._short(plain) if len(plain) <= 64 else self.encode(plain)
        return tokens


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of unfinished characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none."""
        skipped = id in self._tokenizer._skipped
        return "" if skipped else self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD when a character was never finished."""
        return self._decoder.decode(b"", final=True)


def _read_optional(path: Path) -> dict[str, Any]:
    content = files.read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise VicugnaError("not a JSON object", str(path), "Get the file again")
    return content

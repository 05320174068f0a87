"""Byte-level BPE training, tokenizers of all families from their files, text to tokens and back."""

import codecs
import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from vicugna import files
from vicugna.chat.sandbox import Template
from vicugna.chat.template import ROLES, TEMPLATE, Message, Renderer, breaking
from vicugna.errors import VicugnaError
from vicugna.tokenizer import limits, model_file, settings
from vicugna.tokenizer.model_file import BYTES, panics_caught
from vicugna.tokenizer.settings import ImageSettings, Settings

# The first that is there is read.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
THINK, END_THINK = "<think>", "</think>"
# The last four are tokens a reader may see, as in other open models: decoding keeps them.
SPECIAL = (BOS, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN, "<|pad|>")
VISIBLE = (THINK, END_THINK, "<|tool_call|>", "<|/tool_call|>")
ENDINGS = (END_OF_TEXT, "<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>", END_OF_TURN, "<|eom_id|>",
           "<|eot|>", "<|eom|>", "<|im_end|>")
MINIMUM_VOCABULARY = 256 + len(SPECIAL) + len(VISIBLE)
MAXIMUM_VOCABULARY = 1 << 22
# Llama 3's split, but with digits one by one.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


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


def from_model_file(path: str | Path, version: str | None = None, legacy: bool = True
                    ) -> "Tokenizer":
    """The tokenizer in `tokenizer.model`, be it SentencePiece's (Llama 1, 2, Mistral) or the ranks
    of tiktoken (Llama 3, 4), or in `tekken.json` (later Mistrals). It has no chat template.

    `version` is "3", "3.1" (3.2 and 3.3 too) or "4": it names the control tokens of ranks, which
    the file does not; None tells 3.1 from 4 by its size. `legacy` (SentencePiece only) puts a space
    before what follows a control token as well, as SentencePiece and tokenizer.json of Llama 2 and
    Mistral do; False is transformers' `"legacy": false`. Raises VicugnaError.
    """
    path = Path(path)
    if version not in (None, *model_file.VERSIONS):
        raise VicugnaError(f"there is no version {version!r} of Llama's control tokens", str(path),
                           f"Use one of {', '.join(model_file.VERSIONS)}")
    raw, config = model_file.read(path, version, legacy)
    stops = [raw.token_to_id(name) for name in ENDINGS if name.startswith("<|eo")]
    self = Tokenizer.__new__(Tokenizer)
    self._set_up("", raw, Settings(config, ids={"eos": [id for id in stops if id is not None]}))
    return self


class Tokenizer:
    """Text to tokens and back, for our own tokenizers and those of other families."""

    def __init__(self, folder: str | Path) -> None:
        """Read a checkpoint's tokenizer: tokenizer.json or, where there is none, the file of the
        model's maker (see `from_model_file`), with what the files beside it say. VicugnaError when
        a file is missing or broken."""
        folder = Path(folder)
        path = next((folder / name for name in FILES if (folder / name).exists()),
                    folder / FILES[0])
        try:
            said = settings.read(folder)
            if path.name == FILES[0]:
                self._set_up(files.read_text(path), None, said)
            else:
                raw, config = (model_file.read_pair(path, said) if path.name == "vocab.json" else
                               model_file.read(path, None, said.config.get("legacy") is not False))
                self._set_up("", raw, replace(said, config={**config, **said.config}))
        except VicugnaError:
            raise
        except Exception as error:  # the library raises plain Exception
            if path.suffix == ".json":
                files.read_json(path)  # says it better where it is no JSON at all
            raise VicugnaError(f"not a tokenizer: {error}", str(path), "Get it again") from error

    @classmethod
    def of(cls, tokenizer_json: str, config: dict[str, Any], template: str | None,
           endings: Iterable[int] = ()) -> "Tokenizer":
        """A tokenizer from the contents of its three files; `endings` are further ids that end a
        text, as generation_config.json may have."""
        self = cls.__new__(cls)
        self._set_up(tokenizer_json, None, Settings(
            config, templates={} if template is None else {"default": template},
            ids={"eos": list(endings)}))
        return self

    @panics_caught()
    def _set_up(self, tokenizer_json: str, raw: tokenizers.Tokenizer | None,
                said: Settings) -> None:
        if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', tokenizer_json):
            raise ValueError("a prefix of inner words")  # over which the library may abort
        if tokenizer_json.count('"single_word"') > limits.ADDED:  # seconds before they are read
            raise ValueError(f"more than {limits.ADDED:,} added tokens")
        self._raw = tokenizers.Tokenizer.from_str(tokenizer_json) if raw is None else raw
        self._raw.no_truncation()
        self._raw.no_padding()
        more = list(said.added({t.content for t in self._raw.get_added_tokens_decoder().values()}))
        changed = self._raw.add_tokens(more) if more else 0
        limits.check(self._raw)
        if raw and any(raw.token_to_id(name) != id for name, id in said.added_ids.items()):
            raise ValueError("the files beside it give its added tokens other ids")
        self.json = self._raw.to_str(pretty=True) if changed or raw else tokenizer_json
        self.config, self.templates, self._names_map = said.config, said.templates, said.names_map
        self.processors, self.images = said.processors, ImageSettings.read(said.processors)
        self._compiled: dict[str, Template] = {}
        self._added = dict(sorted(self._raw.get_added_tokens_decoder().items()))
        self._names = said.names
        named = set(self._names.values())
        # Some models mark tokens like <think> as ordinary: for us they are control tokens too.
        self._controls = {token.content: id for id, token in self._added.items() if token.special
                          or token.content in named
                          or re.fullmatch(r"[<\[].*[>\]]", token.content)}
        self._skipped = {id for id, token in self._added.items() if token.special}
        decoder = self._raw.decoder
        self._byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self.drops_space = bool(decoder and not self._byte_level
                                and decoder.decode(["▁a"]) == "a")  # the first one of a text
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._marks = re.compile("|".join(
            rf"(?<!\w){re.escape(name)}(?!\w)" if self._added[self._controls[name]].single_word else
            re.escape(name) for name in longest_first) or "(?!)")
        self.control_ids = frozenset(self._controls.values())
        self._unknown = self._controls.get(getattr(self._raw.model, "unk_token", None) or "")
        self.vocab_size = max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAXIMUM_VOCABULARY:
            raise ValueError(f"an id of {self.vocab_size - 1}")
        self._set_ids(said.ids)

    def _set_ids(self, said: dict[str, list[int]]) -> None:
        given = {kind: [id for id in ids if id < self.vocab_size] for kind, ids in said.items()}
        written = "".join(self.templates.values())
        endings = [self._names.get("eos_token", ""), *(end for end in ENDINGS if end in written)]
        own = [self._controls[name] for name in endings if name in self._controls]
        self.eos_ids = (tuple(dict.fromkeys([*own, *given.get("eos", [])])) or
                        tuple(self._controls[end] for end in ENDINGS if end in self._controls))
        end = self.eos_ids[0] if self.eos_ids else 0  # stands in for what a tokenizer lacks
        first = [id for id in self._raw.encode("").ids[:1] if id in self.control_ids]
        own_bos = self._controls.get(self._names.get("bos_token", BOS), first[0] if first else None)
        self.bos_id = own_bos if own_bos is not None else [*given.get("bos", []), end][0]
        self.pad_id = self._controls.get(self._names.get("pad_token", ""),
                                         [*given.get("pad", []), end][0])
        begins = first == [own_bos] or (own_bos is not None
                                        and self.config.get("add_bos_token") is True)
        self._opening = [self.bos_id] if begins else []

    @property
    def template(self) -> str | None:
        """The chat template, if any; the one without tools where there are several."""
        return self.templates.get("default")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tokenizer, the names of its special tokens, the chat templates, and the
        settings of pictures if there are any."""
        several = self.templates.keys() - {"default"}
        images = {} if self.images is None else {"images": asdict(self.images)}
        return files.digest_of({"tokenizer": json.loads(self.json), "names": self._names,
                                "template": self.templates if several else self.template, **images})

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
        files.write_json(folder / "special_tokens_map.json", self._names_map or self._names)
        for name, content in self.processors.items():
            files.write_json(folder / name, content)

    def id_of(self, name: str) -> int | None:
        """The id of a control token, or None when there is no such one."""
        return self._controls.get(name)

    @cached_property
    def _sealed(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """The tokenizer that encodes: the checkpoint's own, but its control tokens have names drawn
        anew in every process, which no text can spell. With their names in it, and the ids of its
        added tokens as the checkpoint has them."""
        seal = secrets.token_hex(8)
        names = {name: f"<{seal}:{id}>" for name, id in self._controls.items()}
        sealed = tokenizers.Tokenizer(self._unspelled_model())
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._raw, part) is not None:
                setattr(sealed, part, getattr(self._raw, part))
        # So many more that no id of a name drawn is one of the vocabulary, whatever its holes.
        sealed.add_tokens([f"<{seal}/{id}>" for id in range(
            self.vocab_size - self._raw.get_vocab_size(with_added_tokens=False))])
        sealed.add_tokens([
            AddedToken(names[token.content], lstrip=token.lstrip, rstrip=token.rstrip,
                       normalized=False) if token.content in names else token
            for token in self._added.values()])
        known = sealed.get_vocab(with_added_tokens=True)
        return sealed, names, {known[names.get(token.content, token.content)]: id
                               for id, token in self._added.items()}

    def _unspelled_model(self) -> models.Model:
        """The model, in which no merge makes a control token; it is copied only where one did."""
        raw = self._raw
        cut = raw.pre_tokenizer.pre_tokenize_str if raw.pre_tokenizer else lambda text: [(text, 0)]
        spelled = {name for name, id in self._controls.items() if id != self._unknown
                   for piece, _ in [(name, None), *cut(name)]
                   for token in raw.model.tokenize(piece) if token.id == id}
        if not spelled:
            return raw.model
        content = json.loads(raw.to_str())
        model = content["model"]
        model["merges"] = [pair for pair in model["merges"]
                           if spelled.isdisjoint([*pair, "".join(pair)])]
        model["vocab"] = {f"\0{name}" if name in spelled else name: id
                          for name, id in model["vocab"].items()}
        bare = {**content, "added_tokens": [], "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(bare)).model

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text: no BOS, and never a control token, whatever the text holds."""
        return self.encode_batch([text])[0]

    @limits.text_errors()
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        whole = self._sealed[0].encode_batch_fast(list(map(valid_unicode, texts)),
                                                  add_special_tokens=False)
        return [self._unsealed(encoding.ids) for encoding in whole]

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue: `encode`, after BOS where the checkpoint puts one."""
        return [*self._opening, *self.encode(text)]

    def _unsealed(self, ids: list[int]) -> list[int]:
        """The checkpoint's ids for those of the sealed tokenizer, of which none is control's."""
        if not (self.control_ids - {self._unknown}).isdisjoint(ids):
            raise VicugnaError("this tokenizer's own merges spell a control token", "text",
                               "Leave the control token's name out of the text")
        known = self._sealed[2]
        return [known.get(id, id) for id in ids]

    @cached_property
    def _vocabulary_bytes(self) -> dict[int, bytes]:
        vocabulary = self._raw.get_vocab(with_added_tokens=False)
        return ({id: self._bytes_of(token) for token, id in vocabulary.items()} |
                {id: token.content.encode() for id, token in self._added.items()})

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
        kept = [id for id in ids if not (skip_special and id in self._skipped)]
        if self._byte_level:
            return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return self._raw.decode(kept, skip_special_tokens=False)

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with <think>, as the templates of some models make it end."""
        return self.decode(prompt[-16:], skip_special=False).rstrip().endswith(THINK)

    def split_reasoning(self, ids: Iterable[int], prompt: Sequence[int] = ()
                        ) -> tuple[str | None, str]:
        """A reply's tokens as (reasoning or None, answer), without the newlines beside the marks;
        the answer is "" if the reasoning never ends. `prompt` is what was replied to. The marks are
        tokens where the checkpoint has such, and otherwise text at the reply's beginning."""
        ids, opened = list(ids), self.opens_reasoning(prompt)
        start, end = self.id_of(THINK), self.id_of(END_THINK)
        if end is not None and start is not None:
            if not (opened or start in ids or end in ids):
                return None, self.decode(ids)
            cut = ids.index(end) if end in ids else len(ids)
            thought, answer = self.decode(i for i in ids[:cut] if i != start), ids[cut + 1:]
            return thought.strip("\n"), self.decode(answer).lstrip("\n")
        text = self.decode(ids)
        if not (opened or text.lstrip().startswith(THINK)):
            return None, text
        thought, _, said = text.lstrip().removeprefix(THINK).partition(END_THINK)
        return thought.strip("\n"), said.lstrip("\n")

    def render(self, messages: list[Message], add_generation_prompt: bool = True,
               tools: list[dict[str, Any]] | None = None) -> str:
        """The text that the chat template makes of a chat (see `chat`)."""
        renderer = self._renderer(messages, tools)
        return renderer.lift(renderer.text(prompt=add_generation_prompt))

    def chat(self, messages: list[Message], add_generation_prompt: bool = True,
             tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Tokens of a chat, BOS included where the template writes it. Only the template can place
        control tokens. `messages` are {"role": "system|user|assistant|tool", "content": text, or a
        list of parts such as {"type": "text", "text": text} and {"type": "image"}}, an assistant's
        optionally with "reasoning" and "tool_calls". Raises VicugnaError for anything else."""
        renderer = self._renderer(messages, tools)
        return self.encode(self._seal(renderer.text(prompt=add_generation_prompt), renderer))

    @limits.text_errors()
    def chat_training(self, messages: list[Message], tools: list[dict[str, Any]] | None = None
                      ) -> tuple[list[int], list[bool]]:
        """Tokens of a finished chat, and which of them the assistant would have to generate after
        the same prompt, its end of turn too."""
        renderer = self._renderer(messages, tools)
        text = renderer.text()
        marks = [(mark.start(), mark.end()) for mark in self._marks.finditer(text)]
        ends = [end for start, end in marks if self._controls[text[start:end]] in self.eos_ids]
        sealed, cuts, done = "", [], 0
        for start in renderer.starts(text):
            # Where only the prompt opens a control token, as <think>, the cut is before it.
            start = next((a for a, b in marks if a < start < b), start)
            if start < done:
                raise VicugnaError("this template ends no turn of the assistant with a token",
                                   "chat_template.jinja", "Use another template")
            end = next((end for end in ends if end > start), len(text))
            for cut in (start, end):
                sealed += self._seal(text[done:cut], renderer)
                cuts.append(len(sealed))
                done = cut
        sealed = valid_unicode(sealed + self._seal(text[done:], renderer))
        encoding = self._sealed[0].encode(sealed, add_special_tokens=False)
        return (self._unsealed(encoding.ids),
                [bisect_right(cuts, start) % 2 == 1 for start, _ in encoding.offsets])

    def _renderer(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Renderer:
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise VicugnaError("this tokenizer has no chat template", "chat_template.jinja",
                               "Use plain text, or add a template to the checkpoint")
        if name not in self._compiled:
            self._compiled[name] = Template(self.templates[name], breaking(self._controls))
        return Renderer(self._compiled[name], self._names, messages, tools)

    def _seal(self, text: str, renderer: Renderer) -> str:
        """Rendered text with the control tokens of the template sealed, and people's text lifted,
        in which the same names are but text."""
        names = self._sealed[1]
        return renderer.lift(self._marks.sub(lambda mark: names[mark.group()], text))


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of unfinished characters; the texts
    joined are `Tokenizer.decode`'s. Where single bytes are tokens of SentencePiece, it is a run of
    them that is or is not text, so runs come whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._run = tokenizer, b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._space = tokenizer.drops_space

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none."""
        if id in self._tokenizer._skipped:
            return ""
        data = self._tokenizer.token_bytes(id)
        if id in self._tokenizer.byte_ids:
            self._run += data
            return ""
        return self._said(self._whole_run() + self._decoder.decode(data))

    def finish(self) -> str:
        """What is left at the end: U+FFFD when a character was never finished."""
        return self._said(self._whole_run() + self._decoder.decode(b"", final=True))

    def _whole_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _said(self, text: str) -> str:
        if self._space and text:
            text, self._space = text.removeprefix(" "), False
        return text

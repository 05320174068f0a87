"""The tokenizer as GGUF's metadata, in the two kinds that llama.cpp has for these models.

`gpt2` is byte-level BPE with one of llama.cpp's named ways to split text into words; `llama` is
SentencePiece's BPE, ordered by the scores of its tokens. The files of the Hugging Face folder go
into the GGUF file as well (tokenizer.json under the format's own `tokenizer.huggingface.json`), so
that what we write comes back exactly.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vicugna.checkpoint.gguf.file import unrepresentable
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer, byte_level
from vicugna.tokenizer.model_file import sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GGML, WHOLE, TEMPLATE = "tokenizer.ggml.", "tokenizer.huggingface.json", "tokenizer.chat_template"
OURS = "vicugna.tokenizer_files"
FILES = re.compile(r"(tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json|"
                   r"(additional_chat_templates/[\w-]+|chat_template)\.jinja")
NAMES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
         "pad_token": "padding_token_id"}
# Tokens that llama.cpp's converter takes for control tokens though their makers do not.
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]")

_foreign = partial(unrepresentable, where="tokenizer.json")
# llama.cpp's names of pre-tokenizers: the expressions that split a text, and whether a word that is
# a token is not split, whatever the merges are (ignore_merges; src/llama-vocab.cpp).
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "llama-bpe": ((byte_level.LLAMA_3_SPLIT,), True),
    "smaug-bpe": ((byte_level.LLAMA_3_SPLIT,), False),
    "qwen2": ((byte_level.QWEN_2_SPLIT,), False),
    "tekken": ((byte_level.TEKKEN_SPLIT,), True),
    "llama4": ((byte_level.LLAMA_4_SPLIT,), False),
    "deepseek-v3": ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
                     r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
                     r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
                     r"\s+(?!\S)|\s+"), False),
    "gpt-2": ((byte_level.GPT_2_SPLIT,), False),
    "smollm": ((r"\p{N}", byte_level.GPT_2_SPLIT), False),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
           "gpt-4o": "llama4", "dbrx": "smaug-bpe"}


def describe(tokenizer: Tokenizer | None, files: Mapping[str, bytes], config: Mapping[str, Any]
             ) -> dict[str, Any]:
    """GGUF's keys for the tokenizer of a model with this config.json; `none` if it has none.

    `files` are those of its Hugging Face folder, as far as there is one. Raises VicugnaError for a
    tokenizer that llama.cpp has no kind for.
    """
    if tokenizer is None:
        return {f"{GGML}model": "none"}
    content, size = json.loads(tokenizer.json), config["vocab_size"]
    model, added = content["model"], {token["content"]: token for token in content["added_tokens"]}
    if model["type"] != "BPE":
        raise _foreign(f"a tokenizer of type {model['type']}")
    ids = model["vocab"] | {name: token["id"] for name, token in added.items()}
    if max(ids.values()) >= size:
        raise VicugnaError(f"the tokenizer has more tokens than the vocabulary of {size:,}",
                           "tokenizer.json", "Use the tokenizer that belongs to the model")
    tokens, kinds = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    for name, id in ids.items():
        tokens[id] = name
        if name not in added:
            kinds[id] = NORMAL
        elif added[name]["special"] or LOOKS_SPECIAL.fullmatch(name):
            kinds[id] = CONTROL
        else:  # compared with text as it is
            tokens[id], kinds[id] = name.replace("▁", " "), USER_DEFINED
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    found: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if '"ByteLevel"' in json.dumps(content["decoder"]):
        found |= {"model": "gpt2", "pre": _split_name(content),
                  "merges": [" ".join(pair) for pair in pairs]}
    elif model.get("byte_fallback"):
        for name, id in model["vocab"].items():
            if name == model.get("unk_token"):
                kinds[id] = UNKNOWN
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", name):
                kinds[id] = BYTE
        # SentencePiece joins first the pair whose result has the highest score.
        ranks: dict[str, int] = {}
        for pair in pairs:
            ranks.setdefault("".join(pair), len(ranks) + 1)
        found |= {"model": "llama", "pre": "default", "add_space_prefix": _has_prefix(content),
                  "scores": [-float(ranks.get(token, 0)) for token in tokens]}
    else:
        raise _foreign("a BPE tokenizer that is neither byte-level nor SentencePiece's")
    for key, field in NAMES.items():
        name, usual = tokenizer.config.get(key), config.get(f"{key}_id")
        usual = usual[0] if isinstance(usual, list) else usual
        if (id := ids.get(name["content"] if isinstance(name, dict) else name, usual)) is not None:
            found[field] = id
    for kind, mark in zip(("bos", "eos"), _frame(content), strict=True):
        id, given = found.get(f"{kind}_token_id"), tokenizer.config.get(f"add_{kind}_token")
        usual = given if isinstance(given, bool) else mark is not None and ids.get(mark) == id
        found[f"add_{kind}_token"] = usual and id is not None
    texts = {name: text.decode() for name, text in files.items() if FILES.fullmatch(name)}
    whole = files["tokenizer.json"].decode() if "tokenizer.json" in files else tokenizer.json
    if "tokenizer.json" not in files or "tokenizer_config.json" not in texts:
        texts["tokenizer_config.json"] = json.dumps(tokenizer.config, ensure_ascii=False)
    keys = {f"{GGML}{key}": value for key, value in found.items()}
    keys |= {WHOLE: whole, OURS: json.dumps(texts, ensure_ascii=False, sort_keys=True)}
    return keys | ({TEMPLATE: tokenizer.template} if tokenizer.template else {})


def _steps(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, normalizer or post-processor, sequences laid flat."""
    if step is None:
        return []
    return ([one for part in step[inner] for one in _steps(part, inner)]
            if step["type"] == "Sequence" else [step])


def _split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way that this tokenizer.json cuts text into words."""
    cuts = []
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            cuts.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts += [byte_level.GPT_2_SPLIT] if step["use_regex"] else []
        else:
            raise _foreign(f"the pre-tokenizer step {step['type']}")
    others = [step["type"] for step in _steps(content["normalizer"], "normalizers")
              if step["type"] != "NFC"]  # which llama.cpp leaves out for Qwen2 too
    wanted = (tuple(cuts), bool(content["model"].get("ignore_merges")))
    for name, known in SPLITS.items():
        if known == wanted and not others:
            return name
    raise _foreign(f"the normalizer {others[0]}" if others else "this way to split text into words")


def _has_prefix(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    return any(step["type"] == "Prepend" or (step["type"] == "Metaspace"
                                             and step.get("prepend_scheme") != "never")
               for step in [*_steps(content["normalizer"], "normalizers"),
                            *_steps(content["pre_tokenizer"], "pretokenizers")])


def _frame(content: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that stand before and after a single text."""
    for step in _steps(content["post_processor"], "processors"):
        if step["type"] == "TemplateProcessing":
            marks = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            return marks[0], marks[-1]
    return None, None


def restore(metadata: Mapping[str, Any], config: Mapping[str, Any],
            generation_config: Mapping[str, Any]) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The tokenizer that a GGUF's keys describe, and the files that a Hugging Face folder has of
    it; the two configs say which ids end a text.

    Raises VicugnaError for kinds that are not read; KeyError, TypeError, ValueError or whatever
    the tokenizer library raises for keys that make no tokenizer.
    """
    values = {key.removeprefix(GGML): value for key, value in metadata.items()}
    kind, template = values.get("model"), metadata.get(TEMPLATE)
    if kind in (None, "none", "no_vocab"):
        return None, {}
    if kind == "llama":  # llama.cpp's defaults
        values = {"bos_token_id": 1, "eos_token_id": 2} | values
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if WHOLE not in metadata and kind not in makers:
        raise VicugnaError(f"a tokenizer of kind {str(kind)[:40]!r} is not read", "",
                           "Use the Hugging Face folder of this model")
    texts = json.loads(metadata.get(OURS, "{}"))
    if not all(map(FILES.fullmatch, texts)):
        raise ValueError(f"{OURS} has files of other names")
    if "tokenizer_config.json" not in texts:
        names = {key: values["tokens"][values[field]] for key, field in NAMES.items()
                 if field in values}
        texts["tokenizer_config.json"] = json.dumps(names | {
            "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"})
    texts["tokenizer.json"] = metadata.get(WHOLE) or json.dumps(makers[kind](values),
                                                                ensure_ascii=False)
    tokenizer = _read(texts, config, generation_config)
    if template not in (None, tokenizer.template):  # it was changed, or was never in a folder
        texts["chat_template.jinja"] = template
        tokenizer = _read(texts, config, generation_config)
    return tokenizer, {name: text.encode() for name, text in texts.items()}


def _read(texts: Mapping[str, str], *configs: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder with these files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        for name, config in zip(("config.json", "generation_config.json"), configs, strict=True):
            (Path(folder) / name).write_text(json.dumps(config))
        try:
            return Tokenizer(folder)
        except VicugnaError as error:
            raise VicugnaError(error.what, "tokenizer", error.fix) from error


def _shared(values: Mapping[str, Any], bos_by_default: bool, vocabulary: dict[str, int]
            ) -> dict[str, Any]:
    """What both kinds of tokenizer.json begin with; `vocabulary` is filled with the model's."""
    tokens, kinds = values["tokens"], values["token_type"].tolist()
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError("tokens repeat, or have no types")
    special = [{"id": id, "content": tokens[id], "special": kind != USER_DEFINED,
                "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
               for id, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
    usual = [id for id, kind in enumerate(kinds) if kind in (NORMAL, BYTE)]
    ids = [token["id"] for token in special]
    if [*usual, *ids] != list(range(len(usual) + len(ids))):  # else they follow the vocabulary
        usual = sorted(usual + ids)
    vocabulary |= {tokens[id]: id for id in usual}
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    marks = {}
    for flag, field, place, default in (("add_bos_token", "bos_token_id", 0, bos_by_default),
                                      ("add_eos_token", "eos_token_id", 9, False)):
        if values.get(flag, default):
            mark = tokens[values[field]]
            single.insert(place, {"SpecialToken": {"id": mark, "type_id": 0}})
            marks[mark] = {"id": mark, "ids": [values[field]], "tokens": [mark]}
    frame = {"type": "TemplateProcessing", "single": single, "special_tokens": marks,
             "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]} if marks else None
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "post_processor": frame}


def _byte_level(values: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the kind gpt2."""
    name = str(values.get("pre"))
    if (name := ALIASES.get(name, name)) not in SPLITS:
        raise VicugnaError(f"pre-tokenizer {name[:40]!r} is not read", "GGUF",
                           "Use the Hugging Face folder of this model")
    cuts, whole_words = SPLITS[name]
    vocabulary: dict[str, int] = {}
    shared = _shared(values, name in ("llama-bpe", "tekken"), vocabulary)
    steps = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
             for cut in cuts]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}
    return shared | {
        "normalizer": None, "decoder": bytes_,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_words,
                  "merges": [merge.split(" ", 1) for merge in values["merges"]]}}


def _sentencepiece(values: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the kind llama: every split of a token into two is a merge, those of the
    tokens with the highest scores first; control tokens take no part."""
    vocabulary: dict[str, int] = {}
    shared = _shared(values, True, vocabulary)
    tokens, kinds, scores = values["tokens"], values["token_type"], values["scores"].tolist()
    pieces = sorted((id for id in vocabulary.values() if kinds[id] in (NORMAL, USER_DEFINED)),
                    key=lambda id: (-scores[id], id))
    raw = sentencepiece(vocabulary, dict.fromkeys(tokens[id] for id in pieces),
                        tokens[values.get("unknown_token_id", 0)],
                        bool(values.get("add_space_prefix", True)))
    return json.loads(raw.to_str()) | shared

"""Tiny tokenizers in the shape of every family: the same kinds of files as the published ones."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from vicugna.tokenizer import Tokenizer, train
from vicugna.tokenizer.byte_level import LLAMA_3_SPLIT, LLAMA_4_SPLIT, QWEN_2_SPLIT

TEXTS = ["the quick brown fox jumps over the lazy dog, and again the fox; then 12345 more!\n\n",
         "Était-ce l'été? Ja, wirklich: 漢字かな交じり文 and кириллица  with   spaces\tand tabs.\n",
         '{"name": "add", "arguments": {"a": 1}} [INST] </s> <think> function user assistant'] * 4
QWEN_SPLIT = QWEN_2_SPLIT
DEEPSEEK_SPLIT = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"
                  r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(splits: Iterable[str], specials: list[str], visible: Iterable[str] = (),
               bos: str | None = None, normalizer: Any = None, normalized: bool = False
               ) -> tokenizers.Tokenizer:
    """Byte-level BPE: Llama 3 and 4, Mistral Nemo, DeepSeek, Qwen."""
    raw = tokenizers.Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(TEXTS, BpeTrainer(
        vocab_size=400, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    raw.add_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    raw.add_tokens([AddedToken(name, special=False, normalized=normalized) for name in visible])
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, raw.token_to_id(bos))]))
    raw.post_processor = processors.Sequence(steps)
    return raw


def sentencepiece_like(first_only: bool, more: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """BPE with byte fallback over text whose spaces are ▁: Llama 1 and 2, Mistral, Mixtral."""
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = tokenizers.Tokenizer(models.BPE())
    learned.normalizer = marked
    learned.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), behavior="isolated")
    learned.train_from_iterator(TEXTS, BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>", *more]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: id for id, name in enumerate(dict.fromkeys(names))}
    raw = tokenizers.Tokenizer(models.BPE(
        vocabulary, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True))
    if first_only:
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        raw.normalizer = marked
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return raw


def write(folder: Path, raw: tokenizers.Tokenizer, template: Any, **config: Any) -> Path:
    """The files of a checkpoint, the template in tokenizer_config.json as in older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {key: value for key, value in config.items() if value is not None}))
    return folder


def flags(raw: tokenizers.Tokenizer) -> dict[str, Any]:
    """added_tokens_decoder of tokenizer_config.json."""
    return {str(id): {"content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
                      "normalized": token.normalized, "single_word": token.single_word,
                      "special": token.special}
            for id, token in raw.get_added_tokens_decoder().items()}


def template(name: str) -> str:
    """A chat template that says what the published one says, in other words."""
    path = Path(__file__).parent / "tokenizer" / "templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def llama2(folder: Path) -> Path:
    return write(folder, sentencepiece_like(first_only=False), template("llama2"), bos_token="<s>",
                 eos_token="</s>", unk_token="<unk>", add_bos_token=True)


def mistral(folder: Path) -> Path:
    """Mistral 7B v0.3 and Mixtral: control tokens of their own, a space only at the beginning."""
    raw = sentencepiece_like(True, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
                                    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"])
    named = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False,
             "normalized": False, "single_word": False, "special": True}
    return write(folder, raw, template("mistral"), bos_token=named,
                 eos_token="</s>", unk_token="<unk>", added_tokens_decoder=flags(raw))


def nemo(folder: Path) -> Path:
    """Mistral Nemo and Small: byte-level; the template once for tools and once without."""
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>"]
    raw = byte_level([LLAMA_4_SPLIT], specials, bos="<s>")
    tooled = template("mistral")
    plain = tooled.replace("tools is not none", "false")
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": tooled}]
    return write(folder, raw, named, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                 pad_token="<pad>")


def llama3(folder: Path) -> Path:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
                "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                "<|python_tag|>"]
    raw = byte_level([LLAMA_3_SPLIT], specials, bos="<|begin_of_text|>")
    write(folder, raw, None, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
          added_tokens_decoder=flags(raw))
    ids = [raw.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    (folder / "chat_template.jinja").write_text(template("llama3"))
    return folder


def llama4(folder: Path) -> Path:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>",
                "<|eom|>", "<|eot|>", "<|python_start|>", "<|python_end|>",
                "<|finetune_right_pad|>", "<|image_start|>", "<|image_end|>", "<|image|>",
                "<|patch|>"]
    raw = byte_level([LLAMA_4_SPLIT], specials, bos="<|begin_of_text|>")
    return write(folder, raw, template("llama4"), bos_token="<|begin_of_text|>",
                 eos_token="<|eot|>", pad_token="<|finetune_right_pad|>",
                 added_tokens_decoder=flags(raw))


def deepseek(folder: Path, opening: str = "") -> Path:
    """DeepSeek V3 and R1: most control tokens are not marked as special."""
    turns = ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
             "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
             "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
             "<｜tool▁output▁end｜>", "<think>", "</think>"]
    raw = byte_level([r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_SPLIT],
                     ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"], turns,
                     normalizer=normalizers.Sequence([]), normalized=True)
    named = {key: {"__type": "AddedToken", "content": name, "lstrip": False, "normalized": True,
                   "rstrip": False, "single_word": False}
             for key, name in (("bos_token", "<｜begin▁of▁sentence｜>"),
                               ("eos_token", "<｜end▁of▁sentence｜>"),
                               ("pad_token", "<｜▁pad▁｜>"))}
    return write(folder, raw, template("deepseek").replace(r"<think>\n", opening), **named,
                 add_bos_token=True, unk_token=None)


def r1(folder: Path) -> Path:
    return deepseek(folder, r"<think>\n")


def qwen2(folder: Path) -> Path:
    """Qwen2 (2.5): no beginning-of-text token, text in normal form C."""
    raw = byte_level([QWEN_SPLIT], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                     ["<tool_call>", "</tool_call>"], normalizer=normalizers.NFC())
    write(folder, raw, template("qwen"), bos_token=None, eos_token="<|im_end|>",
          pad_token="<|endoftext|>", add_bos_token=False, added_tokens_decoder=flags(raw))
    ids = {name: raw.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": list(ids.values()), "bos_token_id": ids["<|endoftext|>"]}))
    return folder


FAMILIES = {make.__name__: make for make in (llama2, mistral, nemo, llama3, llama4, deepseek, r1,
                                             qwen2)}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [inspect.getsource(textwrap), inspect.getsource(json),
            "The old teacher bought 12 pillows.\n\n  Then\tleft.\n" * 20]


@pytest.fixture(scope="session")
def tok(corpus: list[str]) -> Tokenizer:
    """A tokenizer of our own."""
    return train(corpus, 600)

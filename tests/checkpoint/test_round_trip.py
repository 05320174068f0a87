"""transformers -> Vicugna -> transformers: tensors, config, tokenizer and template unchanged."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from every import EVERY, auto, save

import vicugna
from vicugna import checkpoint, tokenizer
from vicugna.checkpoint import convert
from vicugna.checkpoint.hf import weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS = torch.randint(3, 80, (2, 20), generator=torch.Generator().manual_seed(3))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


def content(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    kept = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


def meaning(folder: Path) -> dict:
    """What transformers understands of a config.json."""
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key != "_name_or_path"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EVERY)
def test_every_architecture_in_every_dtype(kind, dtype, tmp_path, monkeypatch):
    """What we write is bit for bit what was read, and transformers loads it unchanged."""
    save(kind, tmp_path / "a", DTYPES[dtype])
    model = vicugna.load(tmp_path / "a", dtype="auto")
    assert {str(p.dtype) for p in model.network.parameters()} == {f"torch.{dtype}"}
    monkeypatch.setattr(weights, "SHARD_BYTES", 30_000)
    model.save(tmp_path / "b")
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(after[name], tensor), name
    assert vicugna.load(tmp_path / "b", dtype="auto").digest == model.digest
    assert (tmp_path / "b" / weights.INDEX).exists()
    if kind == "vicugna":  # which transformers knows by remote code only: test_directory.py
        return
    assert meaning(tmp_path / "a") == meaning(tmp_path / "b")
    first = auto(kind).from_pretrained(tmp_path / "a", dtype="auto")
    again, report = auto(kind).from_pretrained(tmp_path / "b", dtype="auto",
                                               output_loading_info=True)
    assert not any(report.values())
    assert again.dtype == DTYPES[dtype]
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, first(TOKENS).logits)


def test_another_dtype_is_written_in_every_section(tmp_path):
    save("llama4", tmp_path / "a", torch.bfloat16)
    edit(tmp_path / "a" / "config.json", **{
        name: content(tmp_path / "a")[name] | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
        for name in ("text_config", "vision_config")})
    vicugna.load(tmp_path / "a", dtype="float16").save(tmp_path / "b")
    config = content(tmp_path / "b")
    for part in (config, config["text_config"], config["vision_config"]):
        assert (part["dtype"], part["torch_dtype"]) == ("float16", "float16")
    assert {t.dtype for t in stored(tmp_path / "b").values()} == {torch.float16}


@pytest.mark.parametrize("converted", [False, True])
def test_a_number_for_a_switch_is_written_as_transformers_takes_it(converted, tmp_path):
    """As in the first files of Llama 4, which transformers refuses since its fifth release."""
    save("llama4", tmp_path / "a")
    text = content(tmp_path / "a")["text_config"] | {"attn_temperature_tuning": 4}
    edit(tmp_path / "a" / "config.json", text_config=text)
    if converted:
        convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    else:
        vicugna.load(tmp_path / "a").save(tmp_path / "b")
    assert meaning(tmp_path / "b")["text_config"]["attn_temperature_tuning"] is True


@pytest.mark.parametrize("rope", [
    {"rope_theta": 500000.0, "rope_parameters": None,  # as before transformers 5
     "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}},
], ids=["two keys", "one key"])
def test_keys_that_are_not_modelled_are_kept(rope, tmp_path):
    save("llama", tmp_path / "a")
    given = {**rope, "dtype": None, "torch_dtype": "float32", "bos_token_id": 5,
             "eos_token_id": [2, 7], "use_cache": False, "attention_dropout": 0.1,
             "architectures": ["LlamaForCausalLM"], "unknown_note": {"dtype": "x", "n": [1, None]}}
    edit(tmp_path / "a" / "config.json", **given)
    edit(tmp_path / "a" / "generation_config.json", eos_token_id=[2, 7, 9], top_k=5)
    vicugna.load(tmp_path / "a").save(tmp_path / "b")
    written = content(tmp_path / "b")
    assert written == content(tmp_path / "a") | {"dtype": "float32", "torch_dtype": "float32"}
    assert meaning(tmp_path / "a") == meaning(tmp_path / "b")
    for name in "ab":
        assert content(tmp_path / name, "generation_config.json")["eos_token_id"] == [2, 7, 9]


def test_a_changed_config_is_written(tmp_path):
    """Such as one stretched to a longer context."""
    save("llama", tmp_path / "a")
    edit(tmp_path / "a" / "config.json", unknown_note=1)
    model = vicugna.load(tmp_path / "a")
    model.network.config = dataclasses.replace(
        model.config, rope_scaling=None, rope_theta=7.0, max_position_embeddings=512)
    model.save(tmp_path / "b")
    assert vicugna.load(tmp_path / "b").config == model.config
    theirs = meaning(tmp_path / "b")
    assert (theirs["max_position_embeddings"], theirs["unknown_note"]) == (512, 1)
    assert theirs["rope_parameters"]["rope_theta"] == 7.0
    assert theirs["rope_parameters"]["rope_type"] == "default"


def test_a_changed_original_context_is_written(tmp_path):
    """Where the file had it beside the scaling, and would go on counting there."""
    save("llama", tmp_path / "a")
    edit(tmp_path / "a" / "config.json", original_max_position_embeddings=32)
    model = vicugna.load(tmp_path / "a")
    assert model.config.rope_scaling["original_max_position_embeddings"] == 32
    vicugna.load(tmp_path / "a").save(tmp_path / "same")
    assert meaning(tmp_path / "same") == meaning(tmp_path / "a")
    model.network.config = dataclasses.replace(model.config, rope_scaling={
        **model.config.rope_scaling, "original_max_position_embeddings": 16})
    model.save(tmp_path / "b")
    assert vicugna.load(tmp_path / "b").config == model.config
    assert meaning(tmp_path / "b")["rope_parameters"]["original_max_position_embeddings"] == 16


def test_code_is_not_taken_along(tmp_path):
    save("llama", tmp_path / "a")
    (tmp_path / "a" / "modeling_x.py").write_text("raise SystemExit")
    edit(tmp_path / "a" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    vicugna.load(tmp_path / "a").save(tmp_path / "b")
    assert "auto_map" not in content(tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.py"))


# Tokenizers.

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def save_tokenizer(folder: Path, form: str) -> None:
    """A tokenizer of transformers, its chat template in one of the forms that files come in."""
    learned = tokenizer.train(["the cat sat on the mat"] * 3, tokenizer.MINIMUM_VOCABULARY + 4)
    learned.save(folder)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin_of_text|>",
        eos_token=transformers.AddedToken("<|eot_id|>", rstrip=True, special=True))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink()
    several = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    theirs.chat_template = several if form == "folder" else TEMPLATE
    theirs.save_pretrained(folder)
    if form in ("inside", "list"):  # as before transformers 4.43
        (folder / "chat_template.jinja").unlink()
        edit(folder / "tokenizer_config.json", chat_template=TEMPLATE if form == "inside" else [
            {"name": name, "template": text} for name, text in several.items()])
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false, "normalized": false,'
        ' "rstrip": false, "single_word": false}, "additional_special_tokens": ["<|pad|>"]}')
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (folder / "preprocessor_config.json").write_text('{"do_resize" : true}')


@pytest.mark.parametrize("form", ["file", "inside", "list", "folder"])
def test_files_of_the_tokenizer_are_kept(form, tmp_path):
    save("llama", tmp_path / "a")
    save_tokenizer(tmp_path / "a", form)
    model = vicugna.load(tmp_path / "a")
    for _ in range(2):  # the second time over what was written
        model.save(tmp_path / "b")
    ours = {"config.json", "generation_config.json", weights.SINGLE}
    for path in (tmp_path / "a").rglob("*"):
        copy = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.is_file() and path.name not in ours:
            assert copy.read_bytes() == path.read_bytes(), path.name
    chat = [{"role": "user", "content": " hi  <|eot_id|>"}]
    first, second = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert first.chat_template == second.chat_template
    assert (first.apply_chat_template(chat, tokenize=False)
            == second.apply_chat_template(chat, tokenize=False))
    assert first.special_tokens_map == second.special_tokens_map
    assert vicugna.load(tmp_path / "b").digest == model.digest


def test_another_tokenizer_replaces_the_files(tmp_path):
    save("llama", tmp_path / "a")
    save_tokenizer(tmp_path / "a", "inside")
    other = tokenizer.train(["a dog dug"] * 3, tokenizer.MINIMUM_VOCABULARY + 2)
    model = vicugna.load(tmp_path / "a")
    model.tokenizer = other
    model.save(tmp_path / "b")
    assert vicugna.load(tmp_path / "b").tokenizer.digest == other.digest
    assert not (tmp_path / "b" / "tokenizer.model").exists()


# The description of a checkpoint: what is known before its weights are read.

@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_survey_reads_no_weights(kind, tmp_path):
    theirs = save(kind, tmp_path / "a", torch.bfloat16)
    save_tokenizer(tmp_path / "a", "file")
    theirs.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    (tmp_path / "a" / weights.SINGLE).unlink()
    found = checkpoint.survey(tmp_path / "a")
    assert {name: (t.dtype, t.shape) for name, t in found.stored.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in stored(tmp_path / "a").items()}
    assert found.config == content(tmp_path / "a")
    assert found.generation_config == content(tmp_path / "a", "generation_config.json")
    assert found.tokenizer.template == TEMPLATE
    for path in (tmp_path / "a").glob("*.safetensors"):  # only the header is left
        size, length = path.stat().st_size, int.from_bytes(path.read_bytes()[:8], "little")
        with open(path, "r+b") as file:
            file.truncate(8 + length)
            file.truncate(size)
    assert checkpoint.survey(tmp_path / "a").stored == found.stored

"""How many tokens a model is made for, where RoPE scaling says more than max_position_embeddings:
Qwen2.5's model card asks for {"type": "yarn", "factor": 4, original 32768} beside a
max_position_embeddings of 32768, and means 131,072 tokens."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vicugna
from vicugna import checkpoint, models, tokenizer
from vicugna.checkpoint import convert
from vicugna.cli import app, planning
from vicugna.engine import Sampling, generate
from vicugna.errors import VicugnaError
from vicugna.training.supervised import check_length

ORIGINAL = "original_max_position_embeddings"
TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1}
CARD = {"type": "yarn", "factor": 4.0, ORIGINAL: 64}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          ORIGINAL: 64}
TEXT = {**TINY, "head_dim": 8, "rope_scaling": CARD, "max_position_embeddings": 64}
CASES = {
    "as the card says": ({"rope_scaling": CARD}, 256),
    "transformers 5": ({"rope_parameters": {**CARD, "rope_type": "yarn", "rope_theta": 1e6}}, 256),
    "Qwen2": ({"model_type": "qwen2", "rope_scaling": CARD}, 256),
    "Mistral": ({"model_type": "mistral", "rope_scaling": CARD}, 256),
    "Mixtral": ({"model_type": "mixtral", "rope_scaling": CARD}, 256),
    "original beside the scaling": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, ORIGINAL: 64}, 256),
    "no original": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    "a shorter original": ({"rope_scaling": {**CARD, ORIGINAL: 32}}, 128),
    "a product below the stated context": ({"rope_scaling": {**CARD, ORIGINAL: 8}}, 64),
    "raised by the author": ({"rope_scaling": CARD, "max_position_embeddings": 256}, 256),
    "raised by the author further": ({"rope_scaling": CARD, "max_position_embeddings": 999}, 999),
    "null factor": ({"rope_scaling": {**CARD, "factor": None, ORIGINAL: 7}}, 64),
    "fractions": ({"rope_scaling": {**CARD, "factor": 1.7, ORIGINAL: 50}}, 85),
    "mscale keys": ({"rope_scaling": {**CARD, "mscale": 0.7, "mscale_all_dim": 1.0}}, 256),
    "DeepSeek V3": ({"model_type": "deepseek_v3", "max_position_embeddings": 163840,
                     "rope_scaling": {**CARD, "factor": 40, ORIGINAL: 4096}}, 163840),
    "inside Llama 4's text_config": ({"model_type": "llama4", "text_config": TEXT,
                                     "vision_config": {"intermediate_size": 3072,
                                                       "vision_output_dim": 4096}}, 256),
    "inside Mistral 3's text_config": ({"model_type": "mistral3", "text_config": {
        **TEXT, "model_type": "mistral"}}, 256),
    "Llama 3.2, whose product is no context": (
        {"rope_scaling": LLAMA3, "max_position_embeddings": 1024}, 1024),
    "linear with an original": ({"rope_scaling": {**CARD, "type": "linear"}}, 256),
    "linear without": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
    "none": ({}, 64),
    "null": ({"rope_scaling": None}, 64),
}


@pytest.mark.parametrize("changes,context", CASES.values(), ids=CASES)
def test_context_is_the_larger_product(changes, context):
    config = {"model_type": "llama", **TINY, "max_position_embeddings": 64, **changes}
    if config["model_type"] == "deepseek_v3":
        del config["num_key_value_heads"], config["vocab_size"]
    read = models.read_config(config)
    assert read.context_length == context
    assert planning.Subject("it", "it", config).context == context
    assert models.read_config(read.to_dict()).context_length == context
    stated = config.get("text_config", config)["max_position_embeddings"]
    assert read.max_position_embeddings == stated  # what is written back


@pytest.mark.parametrize("scaling", [{**CARD, "type": "linear", ORIGINAL: "far"},
                                     {**CARD, ORIGINAL: "far"}, {**CARD, "factor": "four"},
                                     {**CARD, "factor": 1e200, ORIGINAL: 1e200}])
def test_impossible_products_are_named(scaling):
    with pytest.raises(VicugnaError, match="is impossible"):
        models.read_config({"model_type": "llama", **TINY, "rope_scaling": scaling})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as its card says to edit it: config.json has the keys, and nothing else changed."""
    tok = tokenizer.train(["the cat sat on the mat"] * 5, tokenizer.MINIMUM_VOCABULARY)
    network = models.build({"model_type": "qwen2", **TINY, "vocab_size": tok.vocab_size,
                            "max_position_embeddings": 64})
    models.initialise(network, 0)
    made = tmp_path_factory.mktemp("card") / "model"
    vicugna.Model(network, tok).save(made)
    content = json.loads((made / "config.json").read_text())
    content["rope_scaling"] = CARD
    (made / "config.json").write_text(json.dumps(content))
    return made


def test_prompts_reach_the_scaled_context(folder):
    model = vicugna.load(folder)
    done = generate(model.network, None, [[1] * 250], Sampling(max_new_tokens=99))[0]
    assert (len(done.tokens), done.finish_reason) == (6, "length")
    with pytest.raises(VicugnaError, match="257 tokens, but the context holds 256"):
        generate(model.network, None, [[1] * 257], Sampling())
    chat = [{"role": "user", "content": "x" * 150}]
    assert 64 < len(model.read(chat)[0]) < 256
    assert model.generate(chat, max_new_tokens=2).usage["completion_tokens"] > 0


def test_info_plan_and_training_say_it(folder):
    for verb in ("info", "plan"):
        out = CliRunner().invoke(app, [verb, str(folder), "--json"])
        assert json.loads(out.stdout)["context"] == 256, out.output
    context = vicugna.load(folder).config.context_length
    check_length(256, context, "sft")
    with pytest.raises(VicugnaError, match="the context holds 256"):
        check_length(257, context, "sft")


def test_the_files_are_written_back_unchanged(folder, tmp_path):
    model = vicugna.load(folder)
    model.save(tmp_path / "saved")
    convert.convert(folder, tmp_path / "converted")
    due = json.loads((folder / "config.json").read_text())
    for name in ("saved", "converted"):
        assert json.loads((tmp_path / name / "config.json").read_text()) == due
        again = vicugna.load(tmp_path / name)
        assert again.config == model.config and again.digest == model.digest


def test_gguf_carries_the_original_and_the_factor(folder, tmp_path):
    convert.convert(folder, tmp_path / "m.gguf")
    config = checkpoint.read(tmp_path / "m.gguf").network.config
    assert config.context_length == 256 and config.max_position_embeddings == 64
    convert.convert(tmp_path / "m.gguf", tmp_path / "back")
    model, back = vicugna.load(folder), vicugna.load(tmp_path / "back")
    assert back.config == model.config
    assert torch.equal(back.logits([[1, 2, 3]]), model.logits([[1, 2, 3]]))

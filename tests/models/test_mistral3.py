"""Mistral Small 3.1 and 3.2 against transformers' Mistral3ForConditionalGeneration, on text."""

import json

import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, Mistral3Config

import vicugna
from vicugna import models, tokenizer
from vicugna.errors import VicugnaError
from vicugna.models import counts

TEXT = {**parity.TINY, "model_type": "mistral", "head_dim": 24, "sliding_window": None}
VISION = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "image_size": 28,
        "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
AS_VISION = {"make": AutoModelForImageTextToText}
MINISTRAL = {
    "model_type": "ministral3", "pad_token_id": None, "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "rope_theta": 1e6, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "llama_4_scaling_beta": 0.5}}


def config(tied=False, **text):
    return Mistral3Config(text_config={**TEXT, **text}, vision_config=VISION, image_token_index=9,
                          tie_word_embeddings=tied)


CASES = {
    "as published": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}},
    "tied": {"tied": True},
    "a window": {"sliding_window": 7},
    "yarn": parity.YARN,
    "ministral 3": MINISTRAL,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_equal_transformers(case):
    theirs, ours = parity.pair(config(**case), **AS_VISION)
    parity.agree(theirs, ours, parity.random_tokens(3, 40))


@pytest.mark.parametrize("case", ["tied", "ministral 3"])
def test_gradients_equal_transformers(case):
    theirs, ours = parity.pair(config(**CASES[case]), **AS_VISION)
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_round_trip_with_the_vision_encoder(case, dtype, tmp_path):
    theirs = parity.reference(config(**case), **AS_VISION).to(dtype)
    parity.agree_round_trip(theirs, tmp_path, **AS_VISION)
    written = parity.tensors_of(tmp_path / "ours")
    assert {name.split(".")[0] for name in written} == {"language_model", "vision_tower",
                                                        "multi_modal_projector"}


def published(folder, theirs, **changes):
    """A checkpoint as before transformers 5: no word of ties, RoPE's theta beside the rest."""
    theirs.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["tie_word_embeddings"], content["text_config"]["tie_word_embeddings"]
    content["text_config"]["rope_theta"] = content["text_config"].pop("rope_parameters")[
        "rope_theta"]
    path.write_text(json.dumps({**content, **changes}))
    return content


def test_files_as_published(tmp_path):
    theirs = parity.reference(config(**CASES["as published"]), **AS_VISION)
    content = published(tmp_path / "a", theirs)
    model = vicugna.load(tmp_path / "a")
    parity.agree_uncached(theirs, model.network, parity.random_tokens(1, 20))
    model.save(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {**content, "torch_dtype": "float32"} == written
    assert vicugna.load(tmp_path / "b").digest == model.digest


def test_a_head_of_its_own_though_the_config_ties_it(tmp_path):
    """As transformers 5 saves what it loaded from the published files."""
    theirs = parity.reference(config(**CASES["as published"]), **AS_VISION)
    published(tmp_path / "a", theirs, tie_word_embeddings=True)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    ours = vicugna.load(tmp_path / "a")
    parity.agree_uncached(theirs, ours.network, parity.random_tokens(1, 20))
    ours.save(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert not written["tie_word_embeddings"] and written["text_config"]["use_cache"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_a_head_that_is_missing_is_named(tmp_path):
    theirs = parity.reference(config(**CASES["as published"]), **AS_VISION)
    published(tmp_path, theirs)
    tensors = parity.tensors_of(tmp_path)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(VicugnaError, match=r"missing language_model\.lm_head"):
        vicugna.load(tmp_path)


def test_images_are_refused():
    tok = tokenizer.train(["the cat sat"] * 3, tokenizer.MINIMUM_VOCABULARY)
    tok.templates["default"] = "{{ messages[0].content if messages[0].content is string }}<|pad|>"
    network = models.build({"model_type": "mistral3", "text_config": {
        **TEXT, "vocab_size": tok.vocab_size}})
    models.initialise(network, 0)
    model = vicugna.Model(network, tok)
    with pytest.raises(VicugnaError, match="text-only model"):
        model.logits([[1, 9, 2]], images=torch.zeros(1, 3, 28, 28))
    chat = [{"role": "user", "content": "hi"}]
    assert model.generate(chat, max_new_tokens=3).usage["completion_tokens"] > 0
    for kind in ("image", "image_url"):
        with pytest.raises(VicugnaError, match="takes text only") as caught:
            model.generate([{"role": "user", "content": [{"type": kind, kind: "x"}]}])
        assert caught.value.where == "messages"


@pytest.mark.parametrize("changes", [
    {}, {"vision_feature_layer": [-2, -1]}, {"multimodal_projector_bias": True},
    {"spatial_merge_size": 1}])
def test_the_vision_encoder_is_counted(changes):
    whole = Mistral3Config(text_config=TEXT, vision_config={**VISION, "num_hidden_layers": 2},
                           tie_word_embeddings=False, **changes)
    theirs = AutoModelForImageTextToText.from_config(whole)
    made = counts.count(theirs.config.to_dict())
    assert made.total == sum(p.numel() for p in theirs.parameters())
    text = models.build(theirs.config.text_config.to_dict())
    assert made.active == sum(p.numel() for p in text.parameters())


@pytest.mark.parametrize("images", [
    {"vision_config": 3}, {"vision_config": {**VISION, "patch_size": [14, 14]}},
    {"vision_config": {**VISION, "hidden_size": 0}},
    {"vision_config": VISION, "spatial_merge_size": None}])
def test_impossible_vision_encoders_are_named(images):
    with pytest.raises(VicugnaError, match="of the vision encoder"):
        models.build({"model_type": "mistral3", "text_config": TEXT, **images})


@settings(max_examples=15, deadline=None)
@given(st.builds(dict, hidden_size=st.integers(2, 20), intermediate_size=st.integers(1, 20),
                 num_hidden_layers=st.integers(1, 3), tie_word_embeddings=st.booleans(),
                 model_type=st.sampled_from(["mistral", "ministral3"]),
                 sliding_window=st.none() | st.integers(1, 9)),
       st.sampled_from([[12], [1] * 12, [5, 1, 6]]), st.tuples(st.integers(0, 11),
                                                              st.integers(0, 11)))
def test_any_shape(shape, parts, pads):
    """The same network as its text model's alone; padded and cached as whole."""
    text = {"vocab_size": 97, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "initializer_range": 0.3, **shape}
    alone, whole = (models.build(one) for one in (text, {"model_type": "mistral3",
                                                         "text_config": text}))
    models.initialise(alone, 1)
    whole.language_model.load_state_dict(alone.state_dict())
    assert models.build(whole.config.to_dict()).config == whole.config
    tokens = parity.random_tokens(2, 12)
    positions = (torch.arange(12) - torch.tensor(pads)[:, None]).clamp(min=0)
    got = parity.in_parts(whole, tokens, positions, parts, list(pads))
    for row, n in enumerate(pads):
        due = parity.logits_of(alone, tokens[row : row + 1, n:])
        torch.testing.assert_close(got[row : row + 1, n:], due, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("text", [None, 3, {**TEXT, "model_type": "llama"},
                                  {**TEXT, "model_type": ["mistral"]}])
def test_other_text_models_are_refused(text):
    with pytest.raises(VicugnaError, match="text_config"):
        models.build({"model_type": "mistral3", "text_config": text})

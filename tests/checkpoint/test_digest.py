"""The digest changes with everything that is loaded, and with nothing else."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import checkpoint, models, tokenizer
from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.stored import raw_bytes

CONFIG = {"model_type": "llama", "vocab_size": 280, "hidden_size": 8, "intermediate_size": 12,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 4, "rms_norm_eps": 1e-6}
GENERATION = {"eos_token_id": [1, 2], "temperature": 0.6}


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(["the cat sat on the mat"] * 3, tokenizer.MINIMUM_VOCABULARY + 4)


@pytest.fixture(scope="module")
def network():
    network = models.build(CONFIG)
    models.initialise(network, 0)
    return network


@pytest.fixture(scope="module")
def saved(network, tok, tmp_path_factory):
    """A folder, and the digest of what it holds."""
    folder = tmp_path_factory.mktemp("digest") / "m"
    checkpoint.Checkpoint(network, tok, GENERATION).save(folder)
    return folder, checkpoint.read(folder).digest


def of(network, tok=None, config=None, generation=None, state=None):
    return checkpoint.digest(checkpoint.named_tensors(network) if state is None else state,
                             network.config.to_dict() | (config or {}), tok, generation or {})


def test_in_memory_and_on_disk(network, tok, saved):
    assert of(network, tok, generation=GENERATION) == saved[1]
    assert len(saved[1]) == 64


def test_load_save_load(saved, tmp_path):
    read = checkpoint.read(saved[0])
    read.save(tmp_path / "b")
    assert checkpoint.read(tmp_path / "b").digest == saved[1]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_bit_of_any_tensor_counts(network, data):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = of(network, state=state)
    raw = raw_bytes(state[data.draw(st.sampled_from(sorted(state)))])
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[at] ^= 1 << bit
    assert of(network, state=state) != before
    raw[at] ^= 1 << bit
    assert of(network, state=state) == before


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_flipped_byte_in_the_weights_file_counts(saved, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((folder / weights.SINGLE).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    # The low bits of a mantissa: any other value is still finite and loads.
    at = start + 4 * data.draw(st.integers(0, (len(content) - start) // 4 - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / weights.SINGLE).write_bytes(content)
    assert checkpoint.read(folder).digest != saved[1]


@given(limit=st.integers(1, 3000))
@settings(max_examples=15, deadline=None)
def test_shards_do_not_count(network, tok, saved, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", limit)
        checkpoint.Checkpoint(network, tok, GENERATION).save(folder)
    assert checkpoint.read(folder).digest == saved[1]


def test_order_and_layout_do_not_count(network):
    state = network.state_dict()
    turned = {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor
              for name, tensor in reversed(state.items())}
    assert of(network, state=turned) == of(network)


def test_name_shape_and_dtype_count(network):
    state = network.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    rest = {key: value for key, value in state.items() if key != name}
    variants = [state, rest, {**rest, "other": state[name]},
                {**rest, name: state[name].reshape(-1)},
                {**rest, name: state[name].view(torch.int32).view(torch.float16)},
                {**rest, name: state[name].view(torch.bfloat16)}]
    assert len({of(network, state=variant) for variant in variants}) == len(variants)


def test_a_tied_head_counts_once():
    network = models.build(CONFIG | {"tie_word_embeddings": True})
    models.initialise(network, 0)
    state = network.state_dict()
    assert "lm_head.weight" in state
    assert of(network) == of(network, state={k: v for k, v in state.items() if k[0] == "m"})
    assert "lm_head.weight" not in checkpoint.named_tensors(network)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_character_of_the_template_counts(network, tok, saved, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (folder / "chat_template.jinja").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    (folder / "chat_template.jinja").write_text(text[:at] + "~" + text[at + 1:])
    assert (checkpoint.read(folder).digest != saved[1]) is (text[at] != "~")


@pytest.mark.parametrize("edit", [
    ("config.json", "rms_norm_eps", 1e-5), ("generation_config.json", "temperature", 0.7),
    ("generation_config.json", "eos_token_id", [1]), ("config.json", "rope_theta", 1e6),
])
def test_what_decides_counts(saved, tmp_path, edit):
    assert edited(saved[0], tmp_path, *edit) != saved[1]


@pytest.mark.parametrize("edit", [
    ("config.json", "transformers_version", "9"), ("config.json", "torch_dtype", "bfloat16"),
    ("config.json", "architectures", ["X"]), ("config.json", "_name_or_path", "/home/me"),
    ("generation_config.json", "transformers_version", "9"),
])
def test_notes_do_not_count(saved, tmp_path, edit):
    assert edited(saved[0], tmp_path, *edit) == saved[1]


def edited(source, tmp_path, name, key, value):
    """The digest of `source` with one key of one JSON file set to `value`."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / name).read_text()) | {key: value}
    (tmp_path / name).write_text(json.dumps(content))
    return checkpoint.read(tmp_path).digest


def test_without_a_tokenizer(network, tok):
    assert of(network) != of(network, tok)

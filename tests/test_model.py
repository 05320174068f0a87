"""The Python face: load, logits, generate, stream, save."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import vicugna
from vicugna import checkpoint, models, tokenizer
from vicugna.chat import encode
from vicugna.errors import VicugnaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    tok = tokenizer.train(["the cat sat on the mat"] * 3, tokenizer.MINIMUM_VOCABULARY + 4)
    network = models.build({
        "model_type": "llama", "vocab_size": tok.vocab_size, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3})
    models.initialise(network, 5)
    checkpoint.Checkpoint(network, tok).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return vicugna.load(folder)


def test_import_is_light():
    code = "import sys, vicugna; assert 'torch' not in sys.modules; vicugna.VicugnaError"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(vicugna.__all__) >= {"load", "Model", "Generation", "VicugnaError"}
    with pytest.raises(AttributeError):
        _ = vicugna.nothing


def test_version():
    project = Path(vicugna.__file__).parents[2] / "pyproject.toml"
    assert vicugna.__version__ == tomllib.loads(project.read_text())["project"]["version"]


def test_the_face(model):
    assert isinstance(model, vicugna.Model)
    assert model.config.hidden_size == 16
    assert model.tokenizer.vocab_size == model.config.vocab_size
    assert len(model.digest) == 64


def test_logits(model):
    tokens = [[1, 2, 3], [4, 5, 6]]
    logits = model.logits(tokens)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 3, model.config.vocab_size)
    assert not logits.requires_grad
    assert torch.equal(model.logits(torch.tensor(tokens, dtype=torch.int32)), logits)
    assert torch.allclose(model.logits([[4, 5]])[0], logits[1, :2], atol=1e-5)


@pytest.mark.parametrize(("tokens", "says"), [
    ([[1, 2], [3]], "rectangle"), ("text", "rectangle"), ([1, 2], r"shape \[2\]"), ([[]], "shape"),
    ([[0.5]], "float32"), ([[-1, 2]], "token id -1 is outside"), ([[1, 999]], "999 is outside"),
    ([[2**70]], "rectangle"), ([[None]], "rectangle"),
])
def test_impossible_tokens(model, tokens, says):
    with pytest.raises(VicugnaError, match=says):
        model.logits(tokens)


def test_generate_continues_text(model):
    generation = model.generate("the cat", max_new_tokens=5)
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode("the cat")]
    want, logprobs = [], []
    for _ in generation.tokens:
        row = model.logits([tokens + want])[0, -1].log_softmax(-1)
        want.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    assert generation.tokens == want
    assert generation.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert generation.text == model.tokenizer.decode(want)
    assert generation.finish_reason in ("stop", "length")
    assert generation.usage == {"prompt_tokens": len(tokens), "completion_tokens": len(want),
                          "total_tokens": len(tokens) + len(want)}


def test_generate_answers_messages(model):
    messages = [{"role": "user", "content": "the mat"}]
    settings = {"max_new_tokens": 3, "temperature": 1.0, "seed": 7, "top_k": 5}
    generation = model.generate(messages, **settings)
    assert generation.usage["prompt_tokens"] == len(encode(model.tokenizer, messages))
    assert generation == model.generate(messages, **settings)
    assert generation.reasoning is None or isinstance(generation.reasoning, str)


def test_stream_is_generate_in_pieces(model):
    options = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "min_p": 0.01}
    deltas = list(model.stream("the hat", **options))
    generation = model.generate("the hat", **options)
    assert "".join(delta.text for delta in deltas) == generation.text
    assert [token for delta in deltas for token in delta.tokens] == generation.tokens
    assert deltas[-1].finish_reason == generation.finish_reason


@pytest.mark.parametrize(("prompt", "options", "says"), [
    ("a", {"temperature": -1}, "temperature"), ("a", {"temprature": 1}, "temprature"),
    ("a", {"top_p": "much"}, "sampling"), ([{"role": "user"}], {}, "content"), ([], {}, "messages"),
    (7, {}, "messages"), ("a " * 100, {}, "context"),
])
def test_impossible_requests(model, prompt, options, says):
    for method in (model.generate, model.stream):
        with pytest.raises(VicugnaError, match=says):
            method(prompt, **options)


def test_without_a_tokenizer(model, tmp_path):
    checkpoint.Checkpoint(model.network, None, {}).save(tmp_path / "bare")
    bare = vicugna.load(str(tmp_path / "bare"))
    assert bare.tokenizer is None
    assert torch.equal(bare.logits([[1, 2]]), model.logits([[1, 2]]))
    for method in (bare.generate, bare.stream):
        with pytest.raises(VicugnaError, match=r"no tokenizer: there is no tokenizer\.json"):
            method("hello")
    bare.save(tmp_path / "again")
    assert vicugna.load(tmp_path / "again").digest == bare.digest


def test_save(model, tmp_path):
    model.save(tmp_path / "saved")
    again = vicugna.load(tmp_path / "saved")
    assert again.digest == model.digest
    assert again.generate("the", max_new_tokens=4) == model.generate("the", max_new_tokens=4)


def test_the_digest_follows_the_weights(folder):
    model = vicugna.load(folder)
    before = model.digest
    optimiser = torch.optim.SGD(model.network.parameters(), lr=0.1)
    model.network.lm_head.weight.grad = torch.ones_like(model.network.lm_head.weight)
    optimiser.step()
    trained = model.digest
    model.tokenizer = None
    assert len({before, trained, model.digest}) == 3
    model.save(folder.parent / "trained")
    assert vicugna.load(folder.parent / "trained").digest == model.digest


def test_dtypes_and_devices(folder):
    assert vicugna.load(folder, "bfloat16").network.lm_head.weight.dtype == torch.bfloat16
    assert vicugna.load(folder, "bfloat16").logits([[1]]).dtype == torch.float32
    assert vicugna.load(folder, "auto").digest == vicugna.load(folder).digest
    with pytest.raises(VicugnaError, match="unknown dtype 'int8'"):
        vicugna.load(folder, "int8")
    for device in ("nowhere", "meta:7:7", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(VicugnaError, match="is not usable here"):
            vicugna.load(folder, device=device)


def test_no_such_folder(tmp_path):
    with pytest.raises(VicugnaError, match="no such file or folder"):
        vicugna.load(tmp_path / "none")

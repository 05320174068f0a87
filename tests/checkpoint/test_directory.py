"""The Hugging Face directory: equal to transformers both ways, closed to hostile folders."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from every import fails

from vicugna import checkpoint, models, tokenizer
from vicugna.checkpoint import convert
from vicugna.checkpoint.hf import directory, weights
from vicugna.errors import VicugnaError
from vicugna.model import Model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMAS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "grouped": {"num_key_value_heads": 1, "head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
TOKENS = torch.randint(0, 99, (2, 80), generator=torch.Generator().manual_seed(3))


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, **changes})
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def vicugna_network(**changes) -> torch.nn.Module:
    network = models.build({
        "model_type": "vicugna", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "sliding_window": 8, **changes})
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.normal_(std=0.2)
    return network.eval()


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    save_llama(tmp_path / "m", tie_word_embeddings=True)
    return tmp_path / "m"


# From transformers and back.

@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_from_transformers_and_back(tmp_path, changes):
    theirs = save_llama(tmp_path / "a", **changes)
    read = checkpoint.read(tmp_path / "a")
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert torch.allclose(Model(read.network).logits(TOKENS), want, atol=1e-5, rtol=0)
    read.save(tmp_path / "b")
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not theirs.config.tie_word_embeddings
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, want)
    assert again.generation_config.eos_token_id == 2
    assert checkpoint.read(tmp_path / "b").digest == read.digest


def test_reading_shards_of_transformers(tmp_path):
    theirs = save_llama(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert (checkpoint.read(tmp_path / "shards").digest
            == checkpoint.read(tmp_path / "whole").digest)


def test_transformers_reads_our_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    read = checkpoint.read(folder)
    read.save(tmp_path / "s")
    assert (tmp_path / "s" / weights.INDEX).exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, Model(read.network).logits(TOKENS), atol=1e-5)
    assert checkpoint.read(tmp_path / "s").digest == read.digest


def test_dtypes(tmp_path):
    save_llama(tmp_path / "m", torch.bfloat16)
    wide, kept = (checkpoint.read(tmp_path / "m", dtype) for dtype in (torch.float32, None))
    assert {p.dtype for p in wide.network.parameters()} == {torch.float32}
    assert {p.dtype for p in kept.network.parameters()} == {torch.bfloat16}
    assert wide.digest != kept.digest  # what is loaded is another model
    kept.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    assert checkpoint.read(tmp_path / "b", None).digest == kept.digest
    wide.save(tmp_path / "c")
    assert checkpoint.read(tmp_path / "c").digest == wide.digest


def test_mixed_dtypes_must_be_chosen(folder):
    tensors = stored(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    safetensors.torch.save_file(tensors, folder / weights.SINGLE, {"format": "pt"})
    checkpoint.read(folder)
    with pytest.raises(VicugnaError, match=r"stored as torch.bfloat16 and torch.float32"):
        checkpoint.read(folder, None)


def test_tied_weights_are_one_parameter(folder):
    network = checkpoint.read(folder).network
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_tied_weights_may_be_stored_as_the_head(folder, tmp_path):
    """As safetensors' own save_model does, which keeps the first name of the two."""
    tensors, digest = stored(folder), checkpoint.read(folder).digest
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(tensors, folder / weights.SINGLE)
    assert checkpoint.read(folder).digest == digest
    convert.convert(folder, tmp_path / "again")
    assert "lm_head.weight" not in stored(tmp_path / "again")
    assert checkpoint.read(tmp_path / "again").digest == digest


def test_a_tied_head_may_be_stored_if_it_is_equal(folder):
    tensors = stored(folder)
    digest = checkpoint.read(folder).digest
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older releases
    safetensors.torch.save_file(tensors, folder / weights.SINGLE)
    assert checkpoint.read(folder).digest == digest
    tensors["lm_head.weight"] += 1
    safetensors.torch.save_file(tensors, folder / weights.SINGLE)
    fails(folder, "lm_head.weight differs from the embeddings")


# Our own architecture in transformers.

@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "tie_word_embeddings": False}],
                         ids=["dense", "experts"])
def test_remote_code(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    network = vicugna_network(**changes)
    checkpoint.Checkpoint(network, None, {"eos_token_id": [98]}).save(tmp_path / "m")
    source = (tmp_path / "m" / "modeling_vicugna.py").read_text()
    assert len(source.splitlines()) <= 100
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    ours = Model(network)
    want = ours.logits(TOKENS)
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, want, atol=1e-5)
        mask = torch.ones_like(TOKENS)
        mask[0, :9] = 0
        padded = theirs(TOKENS, attention_mask=mask).logits
        assert torch.allclose(padded[0, 9:], ours.logits(TOKENS[:1, 9:])[0], atol=1e-5)
        padded = theirs(TOKENS, attention_mask=mask.flip(1)).logits
        assert torch.allclose(padded[0, :-9], want[0, :-9], atol=1e-5)
        assert theirs(TOKENS, labels=TOKENS).loss.isfinite()
    tokens = TOKENS[:1, :12]
    for _ in range(5):
        tokens = torch.cat([tokens, ours.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    for use_cache in (False, True):
        out = theirs.generate(TOKENS[:1, :12], max_new_tokens=5, do_sample=False,
                              use_cache=use_cache, eos_token_id=None)
        assert torch.equal(out, tokens)
    theirs.save_pretrained(tmp_path / "again")
    assert checkpoint.read(tmp_path / "again").digest == checkpoint.read(tmp_path / "m").digest


def test_code_in_a_checkpoint_is_never_run(folder):
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_evil.Config",
                                           "AutoModelForCausalLM": "modeling_evil.Model"})
    checkpoint.read(folder)


# Hostile and broken folders.

def test_pickles_are_refused(folder):
    (folder / weights.SINGLE).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin: refused: only safetensors weights are read")
    with pytest.raises(VicugnaError, match="refused"):
        checkpoint.read(folder / "pytorch_model.bin")


def test_no_weights(folder):
    (folder / weights.SINGLE).unlink()
    fails(folder, "neither model.safetensors nor")


@pytest.mark.parametrize(("name", "says"), [
    ("gone.safetensors", "no such file"),
    ("../m2/x.safetensors", "leads out of the folder"),
    ("sub/../../x.safetensors", "leads out of the folder"),
    ("/etc/x.safetensors", "leads out of the folder"),
    ("link.safetensors", "leads out of the folder"),
    ("circle.safetensors", "not a regular one"),
    ("nul\0.safetensors", "weight_map does not give"),
    ("line\n.safetensors", "weight_map does not give"),
    ("long" * 100 + ".safetensors", "weight_map does not give"),
    ("pipe.safetensors", "not a regular one"),
    ("model.bin", "refused: only safetensors"),
    (7, "weight_map does not give"),
])
def test_an_index_cannot_name_files_outside(folder, tmp_path, name, says):
    shutil.move(folder / weights.SINGLE, tmp_path / "x.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    fails(folder, says)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json",
                                  "tokenizer.json"])
def test_links_out_of_the_folder(folder, tmp_path, name):
    (folder / "tokenizer.json").write_text("{}")
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    fails(folder, f"'{name}' leads out of the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json",
                                  "chat_template.jinja"])
def test_links_to_nothing(folder, name):
    """As of a download that was interrupted."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("gone")
    fails(folder, f"{name}: no such file")


def test_links_of_the_hubs_cache(folder, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert checkpoint.read(snapshot).digest == checkpoint.read(folder).digest
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    fails(snapshot, "leads out of the folder")


@pytest.mark.parametrize(("changes", "says"), [
    ({"hidden_size": None}, "missing hidden_size"),
    ({"model_type": "lama"}, "Did you mean 'llama'?"),
    ({"model_type": ["llama"]}, "config.json"),
    ({"hidden_size": 10**18}, "config.json"),
    ({"hidden_size": 2**70}, "config.json"),
    ({"intermediate_size": 2**70}, "config.json"),
    ({"head_dim": 2**40}, "wrong shape"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, but"),
    ({"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "unexpected model.layers.1.input_layernorm.weight"),
    ({"intermediate_size": 40}, "is [32, 48] instead of [32, 40]"),
    ({"rms_norm_eps": float("nan")}, "outside JSON"),
    ({"rope_parameters": None, "rope_theta": None, "rope_scaling": "x"}, "config.json"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
])
def test_impossible_configs(folder, changes, says):
    edit(folder / "config.json", **changes)
    fails(folder, says)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, "1" * 5000, "\udc80"])
def test_malformed_config(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    fails(folder, "config.json")


def test_long_lists_of_faults_are_cut(folder):
    tensors = {f"other.{name}" + "\n" * 10_000: t for name, t in stored(folder).items()}
    safetensors.torch.save_file(tensors, folder / weights.SINGLE)
    with pytest.raises(VicugnaError) as caught:
        checkpoint.read(folder)
    assert str(caught.value).count("other.") == 3
    assert "\n" not in str(caught.value)
    assert "missing model.embed_tokens.weight" in str(caught.value)
    assert "and 17 more" in str(caught.value)


def test_a_broken_tokenizer(folder, tok):
    (folder / "tokenizer.json").write_text("{}")
    fails(folder, "tokenizer.json")
    tok.save(folder)
    checkpoint.read(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    fails(folder, "chat_template.jinja: not UTF-8")
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[1])
    fails(folder, "not a tokenizer")


# Finding a checkpoint.

def test_missing_paths(tmp_path):
    for path in (tmp_path / "none", "a/b/c", "", "x" * 5000, "nul\0"):
        with pytest.raises(VicugnaError):
            checkpoint.read(path)
    with pytest.raises(VicugnaError, match=r"config\.json"):
        checkpoint.read(tmp_path)


def test_hub_ids(folder, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        assert not any(pattern in ("*", "*.py", "*.bin") for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint.read("org/name.v-1").digest == checkpoint.read(folder).digest
    checkpoint.read("org/name@refs/pr/1")
    assert asked == [("org/name.v-1", None), ("org/name", "refs/pr/1")]


def test_hub_failures(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(VicugnaError, match="org/name: no such folder, and the Hub could not be"):
        checkpoint.read("org/name")
    with pytest.raises(VicugnaError, match="org/a--b"):
        checkpoint.read("org/a--b")


# Writing.

@pytest.fixture
def tok():
    return tokenizer.train(["the cat sat on the mat"] * 3, tokenizer.MINIMUM_VOCABULARY + 4)


def test_same_model_same_bytes(tmp_path, tok):
    network = vicugna_network(vocab_size=tok.vocab_size)
    for name in "ab":
        checkpoint.Checkpoint(network, tok).save(tmp_path / name)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors",
                     "modeling_vicugna.py", "tokenizer.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    read = checkpoint.read(tmp_path / "a")
    assert read.generation_config["eos_token_id"] == list(tok.eos_ids)
    assert read.tokenizer.digest == tok.digest
    assert json.loads((tmp_path / "a" / "config.json").read_text())["bos_token_id"] == tok.bos_id


def test_replacing_the_folder_one_was_loaded_from(folder):
    read = checkpoint.read(folder)
    digest = read.digest
    with torch.no_grad():
        read.network.model.norm.weight += 1
    read.save(folder)
    assert checkpoint.read(folder).digest != digest
    assert torch.equal(checkpoint.read(folder).network.model.norm.weight,
                       read.network.model.norm.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_other_files_are_not_deleted(folder):
    read = checkpoint.read(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(VicugnaError, match=r"holds notes\.txt"):
        checkpoint.Checkpoint(read.network, None, {}).save(folder)
    with pytest.raises(VicugnaError, match="holds m, which"):
        checkpoint.Checkpoint(read.network, None, {}).save(folder.parent)
    with pytest.raises(VicugnaError, match="a file stands where"):
        checkpoint.Checkpoint(read.network, None, {}).save(folder / "notes.txt")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "the disk is full"),
                                              (errno.EROFS, "no permission to write")])
@pytest.mark.parametrize("broken", ["raw_bytes", "write_json"])
def test_a_write_that_fails_leaves_the_old(folder, monkeypatch, number, says, broken):
    read = checkpoint.read(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weights if broken == "raw_bytes" else directory, broken, fail)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(VicugnaError, match=says) as caught:
            read.save(target)
        assert str(target) in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_a_place_where_nothing_can_be_written(folder):
    read = checkpoint.read(folder)
    with pytest.raises(VicugnaError, match="/proc/x"):
        checkpoint.Checkpoint(read.network, None, {}).save("/proc/x")

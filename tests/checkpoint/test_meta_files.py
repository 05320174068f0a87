"""Where Meta's files may lie, and hostile ones."""

import json
import os
import shutil
import zipfile
from base64 import b64encode
from pathlib import Path

import pytest
import torch
import transformers
from every import fails
from meta_kit import (
    PARAMS4,
    THIRD,
    VISION,
    D,
    V,
    change,
    edit,
    llama,
    llama_shards,
    one_layer,
    same_logits,
    save,
    save_llama,
)

import vicugna
from vicugna import checkpoint
from vicugna.checkpoint.meta import params as meta_params
from vicugna.errors import VicugnaError

# Where the files lie.

@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "m", llama(), 2)


def test_layouts(folder, tmp_path):
    digest = checkpoint.read(folder).digest
    shutil.copytree(folder, tmp_path / "hf" / "original")
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert checkpoint.read(tmp_path / "hf").digest == digest
    assert checkpoint.read(tmp_path / "hf" / "original").digest == digest
    for rank in range(2):  # as Llama 3.1 405B
        content = torch.load(folder / f"consolidated.{rank:02}.pth")
        (folder / f"consolidated.{rank:02}.pth").unlink()
        (folder / f"consolidated.{rank:02}").mkdir()
        for part in range(2):
            torch.save(dict(list(content.items())[part::2]),
                       folder / f"consolidated.{rank:02}" / f"consolidated-0000{part}-of-2.pth")
    assert checkpoint.read(folder).digest == digest
    single = save_llama(tmp_path / "single", llama())
    os.rename(single / "consolidated.00.pth", single / "consolidated.pth")
    assert checkpoint.read(single).digest == digest
    nested = {"model": json.loads((single / "params.json").read_text())}
    (single / "params.json").write_text(json.dumps(nested))
    assert checkpoint.read(single).digest == digest


def test_the_hugging_face_form_comes_first(folder, tmp_path):
    other = llama(num_hidden_layers=1)
    other.save_pretrained(folder)
    assert checkpoint.read(folder).network.config.num_hidden_layers == 1


def test_the_name_tells_an_instruct_model(tmp_path):
    params = {"dim": 4, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-5, "multiple_of": 2,
              "rope_theta": 500000.0, "vocab_size": 128256}
    shards = llama_shards(one_layer(params), 2, 1, False)
    for name, ends in (("Llama3.1-8B", 128001), ("Llama3.1-8B-Instruct/original", [128001, 128008,
                                                                                   128009])):
        found = checkpoint.survey(save(tmp_path / name, shards, params))
        assert found.generation_config["eos_token_id"] == ends


def ranks_file(path: Path) -> None:
    """A tokenizer.model in tiktoken's form, whose tokens are the 256 bytes."""
    path.write_text("".join(f"{b64encode(bytes([n])).decode()} {n}\n" for n in range(256)))


def test_the_tokenizer(tmp_path):
    model = llama(num_key_value_heads=4, intermediate_size=224, vocab_size=512)
    folder = save_llama(tmp_path / "llama" / "8B", model, **THIRD | {"vocab_size": 512})
    assert checkpoint.read(folder).tokenizer is None
    ranks_file(tmp_path / "llama" / "tokenizer.model")  # where Llama 1 and 2 have it
    third = checkpoint.read(folder).tokenizer
    assert third.encode("ab") == [97, 98]
    assert (third.id_of("<|eot_id|>"), third.id_of("<|eom_id|>")) == (265, None)
    shutil.move(tmp_path / "llama" / "tokenizer.model", folder / "tokenizer.model")
    assert checkpoint.read(folder).tokenizer.digest == third.digest
    edit(folder, use_scaled_rope=True)  # Llama 3.1 names its control tokens otherwise
    loaded = vicugna.load(folder)
    assert loaded.tokenizer.id_of("<|eom_id|>") == 264
    said = loaded.generate("ab", max_new_tokens=3)
    loaded.save(tmp_path / "hf")
    again = vicugna.load(tmp_path / "hf")
    assert again.digest == loaded.digest
    assert again.generate("ab", max_new_tokens=3) == said
    save_llama(folder, llama(num_key_value_heads=4, intermediate_size=224), **THIRD)
    fails(folder, "512 tokens, but 96 embeddings")
    (folder / "tokenizer.model").write_text("x")
    fails(folder, "not a tokenizer")


def test_saved_as_a_hugging_face_folder(folder, tmp_path):
    read = checkpoint.read(folder)
    read.save(tmp_path / "hf")
    assert checkpoint.read(tmp_path / "hf").digest == read.digest
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    same_logits(read, theirs)


# Hostile and broken folders.

class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(folder, tmp_path, zipped):
    path = folder / "consolidated.01.pth"
    torch.save({**torch.load(path), "norm.weight": Evil(tmp_path / "ran")}, path,
               _use_new_zipfile_serialization=zipped)
    fails(folder, "refused: its pickle calls posix.mkdir" if zipped else "truncated, or not a file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.Size([2]), torch.device("cpu"), bytearray(8), {1, 2},
                                   torch.zeros(2, 2).to_sparse()], ids=lambda v: type(v).__name__)
def test_what_no_checkpoint_needs_is_not_unpickled(folder, value):
    change(folder, 0, more=value)
    fails(folder, "refused: its pickle calls")


@pytest.mark.parametrize("share", [0, 0.00001, 0.5, 0.99])
def test_truncated(folder, share):
    path = folder / "consolidated.01.pth"
    os.truncate(path, int(path.stat().st_size * share))
    fails(folder, "consolidated.01.pth: truncated")


def test_bytes_missing_within(folder):
    path = folder / "consolidated.01.pth"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + content[5100:])
    fails(folder, "consolidated.01.pth: truncated")


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    """Write PyTorch's archive again, with another content of some records, as other tools and
    older releases lay it out."""
    with zipfile.ZipFile(path) as archive:  # without the notes of newer releases of PyTorch
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()
                   if "/." not in entry.filename}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, records.get(name.split("/")[-1], data))


def test_archives(folder):
    path = folder / "consolidated.00.pth"
    digest = checkpoint.read(folder).digest
    rezip(path)
    assert checkpoint.read(folder).digest == digest
    rezip(path, **{"0": b"short"})
    fails(folder, "its bytes are not in the file")
    rezip(path, **{"data.pkl": b"\x80\x02" + b"N0" * 2 * 10**6 + b"."})
    fails(folder, "not an archive as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02]."})
    fails(folder, "not a file of tensors")
    rezip(path, **{"data.pkl": b"\x80\x04}."})
    fails(folder, "not a pickle as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02" + b"N0" * 200_000 + b"."})
    fails(folder, "not a pickle as PyTorch writes them")
    rezip(path, **{"data.pkl": b"\x80\x02K\x01K\x02\x85R."})
    fails(folder, "PyTorch does not unpickle it")


def test_a_list_of_too_many_records_is_not_read(folder):
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "a") as archive:
        for n in range(30_000):
            archive.writestr(f"archive/{n:020}", b"")
    fails(folder, "more records than a model has tensors")
    path.write_bytes(b"PK")
    fails(folder, "not a zip file")


def test_a_compressed_archive(folder):
    rezip(folder / "consolidated.00.pth", zipfile.ZIP_DEFLATED)
    fails(folder, "not an archive as PyTorch writes them")


def test_tensors_larger_than_the_file(folder):
    change(folder, 0, **{"norm.weight": torch.zeros(1).expand(10**12)})
    fails(folder, "its bytes are not in the file")
    big = torch.zeros(10**5)
    change(folder, 0, **{"norm.weight": None, **{f"layers.{n}.x": big for n in range(1000)}})
    fails(folder, "claim more bytes than it has")


def test_nan(folder):
    weight = torch.load(folder / "consolidated.01.pth")["layers.1.feed_forward.w2.weight"]
    weight[3, 3] = float("nan")
    change(folder, 1, **{"layers.1.feed_forward.w2.weight": weight})
    checkpoint.survey(folder)  # which reads no values
    fails(folder, "1 of 11,264 values are NaN or infinite")


@pytest.mark.parametrize(("rank", "changes", "says"), [
    (1, {"norm.weight": None}, "norm.weight: not every shard has it"),
    (1, {"layers.7.ffn_norm.weight": torch.ones(D)}, "not every shard has it"),
    (1, {"layers.0.feed_forward.w1.weight": torch.ones(87, D)},
     "[87, 64] of torch.float32, but [88, 64] of torch.float32 in consolidated.00.pth"),
    (1, {"norm.weight": torch.ones(D).bfloat16()}, "[64] of torch.bfloat16, but"),
    (1, {"norm.weight": torch.ones(D).int()}, "stored as torch.int32, which is not read"),
    (1, {"norm.weight": torch.full((D,), 7.0)}, "norm.weight: its values are not those in"),
    (1, {"norm.weight": torch.full((D,), float("nan"))}, "the shards are of several models"),
])
def test_shards_that_differ(folder, rank, changes, says):
    change(folder, rank, **changes)
    fails(folder, says)


@pytest.mark.parametrize(("changes", "says"), [
    ({"bias": torch.ones(D)}, "unexpected: no Llama of Meta has it"),
    ({"layers.0.attention.wo.weight": torch.ones(D)}, "one that is not a matrix"),
    ({"layers.0.attention.wq.weight": torch.ones(31, D)},
     "cannot merge 2 tensor-parallel shards of shape [31, 64] into q_proj"),
    ({"layers.0.attention.wv.weight": torch.ones(D)}, "v_proj.weight is [64] instead of [64, 64]"),
    ({"layers.0.attention.wv.weight": None}, "missing model.layers.0.self_attn.v_proj.weight"),
    ({"layers.0.attention.wv.weight": torch.ones(8, D)}, "v_proj.weight is [16, 64] instead"),
    ({"layers.0.feed_forward.w2.weight": torch.tensor(1.0)}, "into down_proj"),
    ({"layers.0.attention.wk.weight": torch.tensor(1.0)}, "into k_proj"),
    ({"tok_embeddings.weight": torch.ones(V, D)}, "wrong shape"),
    ({7: torch.ones(2)}, "not a file of tensors"),
])
def test_tensors_that_fit_no_llama(folder, changes, says):
    for rank in range(2):
        content = {**torch.load(folder / f"consolidated.{rank:02}.pth"), **changes}
        torch.save({key: value for key, value in content.items() if value is not None},
                   folder / f"consolidated.{rank:02}.pth")
    fails(folder, says)


def test_missing_shards(tmp_path):
    folder = save_llama(tmp_path / "m", llama(), 4)
    (folder / "consolidated.03.pth").rename(tmp_path / "last")
    fails(folder, "3 shards are there, but 4 make a model of width 64")
    (tmp_path / "last").rename(folder / "consolidated.03.pth")
    (folder / "consolidated.01.pth").unlink()
    fails(folder, "consolidated.01.pth is missing")
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.0.pth")
    fails(folder, "is a second shard 0")


def test_links_out_of_the_folder(folder, tmp_path):
    for name in ("consolidated.01.pth", "params.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        fails(folder, f"'{name}' leads out of the folder")


@pytest.mark.parametrize(("changes", "says"), [
    *(({key: None}, f"missing {key}") for key in ("dim", "n_layers", "n_heads", "norm_eps")),
    ({"dim": "64"}, "dim: Input should be a valid integer"),
    ({"dim": True}, "dim: Input should be a valid integer"),
    ({"dim": 2**70}, "dim: Input should be less than"),
    ({"n_layers": 0}, "n_layers: Input should be greater than 0"),
    ({"n_layers": 10**9}, "n_layers is 1,000,000,000, but there are only"),
    ({"n_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
    ({"n_heads": 7}, "dim 64 is not n_heads 7"),
    ({"n_heads": 64}, "a head's width, 1, is odd"),
    ({"n_kv_heads": 3}, "params.json: num_attention_heads 8 is not a multiple of num_key_value"),
    ({"head_dim": 16}, "dim 64 is not n_heads 8"),
    ({"dim": 128}, "2 shards are there, but 4 make a model of width 128"),
    ({"multiple_of": 256}, "is [176, 64] instead of [256, 64]"),
    ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier: Input should be less than"),
    ({"norm_eps": float("nan")}, "outside JSON"),
    ({"vocab_size": 95}, "vocab_size is 95, but there are 96 embeddings"),
    ({"moe_args": {"top_k": 1}}, "missing moe_args.num_experts"),
    ({"quantization_args": {"scheme": "int4"}}, "it is quantised"),
    ({"lora_args": {"rank": 16}}, "it has LoRA adapters"),
    ({"vision_chunk_size": 448}, "Llama 3.2 with images"),
    ({"sliding_window": 4096}, "it is not a Llama"),
])
def test_impossible_params(folder, changes, says):
    edit(folder, **changes)
    fails(folder, says)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, "1" * 5000])
def test_malformed_params(folder, content):
    (folder / "params.json").write_text(content)
    fails(folder, "params.json")


def test_images_that_are_not_square(tmp_path):
    with pytest.raises(VicugnaError, match="not square"):
        meta_params.parse({**PARAMS4, "vision_args": {
            **VISION, "patch_size": {"height": 4, "width": 2}}}, tmp_path)

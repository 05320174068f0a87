"""Hostile and broken GGUF files: one clear error, and nothing made of what they promise."""

import os
import struct
from pathlib import Path

import gguf_kit
import numpy as np
import pytest
from gguf_kit import MODELS, fails, folder_of, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import checkpoint, tokenizer
from vicugna.checkpoint.convert import convert
from vicugna.errors import VicugnaError


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return gguf_kit.learned()


def text_(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(tensors: bytes = b"", keys: bytes = b"", counts: tuple[int, int] = (0, 0),
           version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, *counts) + keys + tensors


def tensor_(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0,
            dimensions: int | None = None) -> bytes:
    return (text_(name) + struct.pack("<I", len(shape) if dimensions is None else dimensions)
            + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset))


KEY = text_(b"a")
HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "another kind": (b"PK\3\4" * 20, "not a GGUF file"),
    "only magic": (b"GGUF", "truncated"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=0x03000000), "big|little-endian"),
    "tensors": (header(counts=(2**60, 0)), "1,152,921,504,606,846,976 tensors"),
    "keys": (header(counts=(0, 2**60)), "keys cannot be in it"),
    "long key": (header(keys=text_(b"a", 2**60) + b" " * 99, counts=(0, 1)), "promised at byte"),
    "long value": (header(keys=KEY + struct.pack("<I", 8) + text_(b"x", 2**60), counts=(0, 1)),
                   "1,152,921,504,606,846,976 bytes promised"),
    "long list": (header(keys=KEY + struct.pack("<IIQ", 9, 8, 2**60), counts=(0, 1)),
                  "strings cannot be in it"),
    "long array": (header(keys=KEY + struct.pack("<IIQ", 9, 4, 2**60), counts=(0, 1)),
                   "values cannot be in it"),
    "long string in a list": (header(keys=KEY + struct.pack("<IIQQ", 9, 8, 2, 2**60) + b" " * 30,
                                     counts=(0, 1)), "bytes promised"),
    "cut off in a list": (header(keys=KEY + struct.pack("<IIQ", 9, 8, 2) + text_(b"abcdefg") +
                                 b" ", counts=(0, 1)), "bytes promised"),
    "arrays in arrays": (header(keys=KEY + struct.pack("<IIQ", 9, 9, 1) + b" " * 30,
                                counts=(0, 1)), "unknown type 9"),
    "type of value": (header(keys=KEY + struct.pack("<IQ", 99, 1), counts=(0, 1)),
                      "unknown type 99"),
    "not text": (header(keys=text_(b"\xff\xfe") + struct.pack("<II", 4, 1), counts=(0, 1)),
                 "not UTF-8"),
    "twice": (header(keys=(KEY + struct.pack("<II", 4, 1)) * 2, counts=(0, 2)), "twice"),
    "alignment": (header(keys=text_(b"general.alignment") + struct.pack("<II", 4, 0),
                         counts=(0, 1)), "alignment is impossible"),
    "dimensions": (header(tensor_(b"t", (1,), dimensions=2**31) + bytes(64), counts=(1, 0)),
                   "2,147,483,648 dimensions"),
    "shape": (header(tensor_(b"t", (2**62, 2**62)) + bytes(64), counts=(1, 0)), "truncated"),
    "no values": (header(tensor_(b"t", (0, 2**62)) + bytes(64), counts=(1, 0)), "not possible"),
    "type": (header(tensor_(b"t", (4,), kind=250) + bytes(64), counts=(1, 0)), "GGML type 250"),
    "blocks": (header(tensor_(b"t", (33,), kind=8) + bytes(99), counts=(1, 0)), "not possible"),
    "outside": (header(tensor_(b"t", (4,), offset=2**60) + bytes(64), counts=(1, 0)),
                "truncated: it ends at"),
    "unaligned": (header(tensor_(b"t", (4,), offset=4) + bytes(99), counts=(1, 0)), "not aligned"),
    "overlap": (header(tensor_(b"t", (16,)) + tensor_(b"u", (16,), offset=32) + bytes(256),
                       counts=(2, 0)), "overlaps the one before"),
    "same name": (header(tensor_(b"t", (8,)) + tensor_(b"t", (8,), offset=32) + bytes(256),
                         counts=(2, 0)), "occurs twice"),
    "no architecture": (header(), "architecture None is not read"),
}


@pytest.mark.parametrize(("content", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, content, says):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(VicugnaError) as caught:
        checkpoint.read(path)
    assert any(one in str(caught.value) for one in says.split("|"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_million_empty_strings_are_refused_unread(tmp_path):
    """A sparse file costs its maker nothing: what it promises is not made in memory."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header(keys=KEY + struct.pack("<IIQ", 9, 8, 10**8), counts=(0, 1)))
    os.truncate(path, 10**9)
    fails(path, "100,000,000 strings cannot be in it")
    path.write_bytes(header(keys=KEY + struct.pack("<IIQQ", 9, 8, 2, 9 * 10**8), counts=(0, 1)))
    os.truncate(path, 10**9)
    fails(path, "900,000,008 bytes promised")


@pytest.fixture(scope="module")
def small(tmp_path_factory, bpe) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    folder_of(folder / "a", MODELS["llama"], bpe)
    convert(folder / "a", folder / "m.gguf")
    return (folder / "m.gguf").read_bytes()


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.6, 0.9, 0.9999])
def test_truncated_files(tmp_path, small, share):
    (tmp_path / "m.gguf").write_bytes(small[:int(len(small) * share)])
    fails(tmp_path / "m.gguf", "truncated")


def test_weights_that_are_not_numbers(tmp_path, small):
    end = np.frombuffer(bytearray(small[-256:]), np.float32).copy()
    end[-1] = np.nan
    (tmp_path / "m.gguf").write_bytes(small[:-256] + end.tobytes())
    fails(tmp_path / "m.gguf", "NaN or infinite")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    for name in ("llama4", "deepseek", "deepseek yarn"):
        folder_of(folder / "a", MODELS[name], None)
        convert(folder / "a", folder / f"{name}.gguf")
    return {path.stem: path for path in folder.glob("*.gguf")}


@pytest.mark.parametrize(("name", "tensor", "shape", "says"), [
    ("llama4", "blk.1.ffn_up_exps.weight", None, "a part of tensor model.layers.1.feed_forward"),
    ("deepseek", "blk.0.attn_k_b.weight", None, "a part of tensor model.layers.0.self_attn.kv_b"),
    ("deepseek", "blk.0.attn_v_b.weight", (4, 24, 63), "its keys make no model"),
    ("deepseek", "blk.0.attn_v_b.weight", (24,), "its keys make no model"),
    ("deepseek", "blk.0.attn_k_b.weight", (4, 64, 33), "kv_b_proj.weight is [228, 64] instead"),
    ("deepseek", "blk.1.ffn_up_exps.weight", (5000, 1, 1), "5,000 experts"),
    ("deepseek", "blk.1.ffn_up_exps.weight", (9, 32, 64), "unexpected model.layers.1.mlp.experts"),
    ("deepseek", "blk.1.exp_probs_b.bias", None, "missing model.layers.1.mlp.gate.e_score"),
    ("llama4", "blk.1.ffn_gate_exps.weight", (64,), "its keys make no model"),
    ("llama4", "blk.1.ffn_gate_exps.weight", (6, 63, 64), "instead of [6, 64, 128]"),
    ("llama4", "blk.1.ffn_down_exps.weight", (2, 2, 2, 2), "is [2, 2, 2, 2] instead of"),
])
def test_parts_that_do_not_fit(tmp_path, mixtures, name, tensor, shape, says):
    zeros = shape and np.zeros(shape, np.float32)
    for drop in (("vicugna.",), ("nothing",)):  # with our config, and by GGUF's keys alone
        fails(rewritten(mixtures[name], tmp_path / "m.gguf", drop, {tensor: zeros}), says)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_header_breaks_out(tmp_path_factory, small, mixtures, data):
    """A damaged file is read or refused with one line; nothing else happens."""
    chosen = data.draw(st.sampled_from(["llama", *mixtures]))
    damaged = bytearray(mixtures[chosen].read_bytes() if chosen in mixtures else small)
    where = st.integers(0, 1400) | st.integers(0, len(damaged) - 1)
    for at, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=1,
                                        max_size=4)):
        damaged[at] = value
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint.read(path)
    except VicugnaError as error:
        assert "\n" not in str(error)

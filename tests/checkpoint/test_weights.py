"""Safetensors files: hostile headers are refused, tensors survive the round trip bit by bit."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.stored import Mapped
from vicugna.errors import VicugnaError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(tmp_path: Path, header: bytes | str | dict, data: bytes = b"", length: int | None = None
        ) -> Path:
    """A safetensors file made by hand."""
    if isinstance(header, dict):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(("header", "data", "length", "says"), [
    ({"a": ENTRY}, b"\0" * 4, None, "truncated: the header promises 8 bytes"),
    ({"a": ENTRY}, b"\0" * 12, None, "the file holds 12"),
    ({"a": ENTRY}, b"\0" * 8, 2**60, "a header of 1,152,921,504,606,846,976 bytes"),
    ({"a": ENTRY}, b"\0" * 8, 1000, "truncated"),
    (b"{" + b" " * 100, b"", None, "header is not valid"),
    (b"[1, 2]", b"", None, "not a JSON object"),
    (b"\xff\xfe{}x", b"", None, "header is not valid"),
    (b"[" * 100_000, b"", None, "header is not valid"),
    ('{"a": 1, "a": 2}', b"", None, "a occurs twice"),
    ('{"a": ' + "9" * 5000 + "}", b"", None, "header is not valid"),
    ({"a": 1}, b"", None, "needs exactly dtype"),
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, None, "overlaps"),
    ({"a": ENTRY, "b": ENTRY}, b"\0" * 8, None, "overlaps"),
    ({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"\0" * 16, None, "gap"),
    ({"a": {**ENTRY, "data_offsets": [2**62, 2**62 + 8]}}, b"\0" * 8, None, "gap"),
    ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8, None, "takes 8 bytes"),
    ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "data_offsets": [0]}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "data_offsets": [0, 1e400]}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8, None, "takes 12 bytes"),
    ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"\0" * 8, None, "but the header gives it 8"),
    ({"a": {**ENTRY, "shape": [True]}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "shape": [1] * 100}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "shape": [-1, -2]}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "shape": "2"}}, b"\0" * 8, None, "not lists of sizes"),
    ({"a": {**ENTRY, "dtype": "I8"}}, b"\0" * 8, None, "stored as I8, which is not read"),
    ({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 8, None, "which is not read"),
    ({"x\ny" * 10_000: {**ENTRY, "shape": [3]}}, b"\0" * 8, None, "takes 12 bytes"),
])
def test_hostile_headers(tmp_path, header, data, length, says):
    with pytest.raises(VicugnaError) as caught:
        weights.scan([raw(tmp_path, header, data, length)])
    assert says in str(caught.value)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"1234567", b"\0" * 8])
def test_tiny_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(VicugnaError):
        weights.scan([path])


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**31))
    os.truncate(path, 2**32)  # sparse: takes no disk
    with pytest.raises(VicugnaError, match="2,147,483,648"):
        weights.scan([path])


def test_a_name_in_two_files(tmp_path):
    for name in "ab":
        safetensors.torch.save_file({"t": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(VicugnaError, match=r"tensor t is in a\.safetensors too"):
        weights.scan([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_read(tmp_path_factory, content, length):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + content)
    try:
        weights.scan([path])
    except VicugnaError as error:
        assert str(path) in str(error)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4), "turned": torch.randn(4, 6).T,
            "half": torch.randn(3).half()}


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    weights.write(tmp_path, some_tensors())
    back = safetensors.torch.load_file(tmp_path / weights.SINGLE)
    assert back.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_bytes_depend_on_values_alone(tmp_path):
    for folder, tensors in (("x", some_tensors()), ("y", dict(reversed(some_tensors().items())))):
        (tmp_path / folder).mkdir()
        weights.write(tmp_path / folder, tensors)
    assert (tmp_path / "x" / weights.SINGLE).read_bytes() == (
        tmp_path / "y" / weights.SINGLE).read_bytes()


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 40)
    weights.write(tmp_path, some_tensors())
    index = json.loads((tmp_path / weights.INDEX).read_text())
    files = sorted(path for path in tmp_path.glob("*.safetensors"))
    assert len(files) == 3  # a and b; empty, half and scalar ...; turned, which is over the limit
    assert files[0].name == "model-00001-of-00003.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in some_tensors().values())
    found = weights.scan(files)
    assert {name: t.file.name for name, t in found.items()} == index["weight_map"]


def test_what_is_written_can_be_read(tmp_path):
    """However many tensors there are, and however long their names."""
    one = torch.ones(1)
    tensors = {f"{'layers.' * 16}{n}": one for n in range(2 * weights.SHARD_TENSORS + 1)}
    weights.write(tmp_path, tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 and weights.scan(files).keys() == tensors.keys()


def read(folder: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    found = weights.scan(sorted(folder.glob("*.safetensors")))[name]
    return Mapped().read([found], found.shape, dtype, torch.device("cpu"))


def test_reading_maps_and_converts(tmp_path):
    weights.write(tmp_path, some_tensors())
    for name, tensor in some_tensors().items():
        kept, wide = (read(tmp_path, name, dtype) for dtype in (tensor.dtype, torch.float32))
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor)
        assert wide.dtype == torch.float32 and torch.equal(wide, tensor.float())


def test_only_tensors_that_are_asked_for_are_read(tmp_path):
    weights.write(tmp_path, {"a": torch.ones(4), "b": torch.full((4,), float("nan"))})
    assert torch.equal(read(tmp_path, "a", torch.float32), torch.ones(4))


def test_changing_a_mapped_tensor_leaves_the_file(tmp_path):
    weights.write(tmp_path, {"a": torch.ones(4)})
    before = (tmp_path / weights.SINGLE).read_bytes()
    read(tmp_path, "a", torch.float32).zero_()
    assert (tmp_path / weights.SINGLE).read_bytes() == before


def test_tensors_that_are_not_aligned_to_their_elements(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header)
    path = raw(tmp_path, text + " " * (5 - (8 + len(text)) % 4), struct.pack("<2f", 1.5, -2.0))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 4
    for dtype in (torch.float32, torch.float64):
        assert read(tmp_path, "a", dtype).tolist() == [1.5, -2.0]


def test_a_file_that_shrank_since_its_header_was_read(tmp_path):
    weights.write(tmp_path, {"a": torch.ones(5000)})
    found = weights.scan([tmp_path / weights.SINGLE])["a"]
    os.truncate(tmp_path / weights.SINGLE, 100)
    with pytest.raises(VicugnaError, match="cannot be read"):
        Mapped().tensor(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("size", "at"), [(3, 1), (1, 0), (100_003, 0), (100_003, 100_002)])
def test_values_that_are_not_finite(tmp_path, dtype, asked, bad, size, at):
    tensor = torch.randn(size).to(dtype)
    tensor[at] = bad
    weights.write(tmp_path, {"a": tensor})
    with pytest.raises(VicugnaError, match=f"1 of {size:,} values are NaN or infinite"):
        read(tmp_path, "a", asked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_at_the_ends_of_a_dtype_are_no_fault(tmp_path, dtype):
    """Such as a sum that would overflow."""
    ends = torch.finfo(dtype)
    tensor = torch.tensor([ends.max, ends.min, ends.tiny, -0.0], dtype=dtype).repeat(9000)
    weights.write(tmp_path, {"a": tensor, "b": tensor.abs()})
    for name, due in (("a", tensor), ("b", tensor.abs())):
        assert torch.equal(read(tmp_path, name, dtype), due)


@pytest.mark.parametrize("asked", [torch.float16, torch.float32])
def test_values_that_do_not_fit_the_dtype(tmp_path, asked):
    tensor = torch.tensor([1.0, 1e39, -2.0], dtype=torch.float64)
    weights.write(tmp_path, {"a": tensor})
    with pytest.raises(VicugnaError, match=f"1 of 3 values are too large for {asked}"):
        read(tmp_path, "a", asked)


def test_integers_are_not_written(tmp_path):
    with pytest.raises(VicugnaError, match=r"torch\.int64 cannot be written"):
        weights.write(tmp_path, {"a": torch.ones(4, dtype=torch.long)})

"""Quantised tensors of GGUF files, decoded to floats."""

import ggml_blocks
import gguf
import numpy as np
import pytest

from vicugna.checkpoint.gguf.file import Entry, decode


@pytest.mark.parametrize("kind", ggml_blocks.SIZES)
def test_blocks_are_decoded_as_their_format_says(kind):
    rows = ggml_blocks.random_rows(kind, 3, 512)
    entry = Entry(ggml_blocks.ggml_type(kind).value, (3, 512), rows.reshape(-1))
    want = ggml_blocks.values_of(kind, rows)
    assert np.array_equal(decode(entry).numpy(), want)
    assert len(np.unique(want)) > 200


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_blocks_of_given_values_decode_to_them(kind):
    """What `gguf` quantises comes back within half a step."""
    values = np.random.default_rng(1).normal(0, 0.02, (4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, ggml_blocks.ggml_type(kind))
    back = ggml_blocks.values_of(kind, packed)
    step = (values.reshape(4, 2, 32).max(-1) - values.reshape(4, 2, 32).min(-1)) / {
        "q4": 15, "q5": 31, "q8": 127}[kind[:2]]
    assert (np.abs(back - values).reshape(4, 2, 32) <= 1.1 * step[..., None]).all()

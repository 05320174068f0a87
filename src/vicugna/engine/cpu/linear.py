"""Linear layers over packed weights: `pack` or `from_gguf` once, then `matmul`.

A row of the result has the same bits whatever the other rows are, and on every number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.engine.cpu import packing, product
from vicugna.engine.cpu.arena import ARENA
from vicugna.engine.cpu.formats import BY_NUMBER, FORMATS, ROWS, Format
from vicugna.engine.cpu.threads import Instruction, program, run
from vicugna.errors import VicugnaError, did_you_mean


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K] in memory, as formats.py describes. `codes` and `scales` are uint8 arrays."""

    format: Format
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray

    @property
    def kind(self) -> str:
        return self.format.name

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def blocks(self) -> int:
        """Of 16 rows; the last may have rows of zeros."""
        return -(-self.shape[0] // ROWS)


def pack(weight_NK: Tensor, kind: str) -> Packed:
    """Weights of any float dtype, packed as one of `FORMATS`. Blocks are quantised to the nearest,
    as llama.cpp does without an importance matrix (q4_0, q4_1, q8_0).

    Raises VicugnaError for an unknown kind, one that weights are not quantised to, or if K is not a
    multiple of its block.
    """
    N, K = weight_NK.shape
    form = _format(kind, K)
    if not form.is_float:
        if kind not in QUANTISERS:
            raise VicugnaError(f"weights are not quantised to {kind} here", "weights",
                               "Known: " + ", ".join(QUANTISERS))
        parts = [QUANTISERS[kind](rows.float()) for rows in weight_NK.split(1024)]
        return from_gguf(kind, np.concatenate(parts), (N, K))
    packed = _empty(form, N, K)
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    view_BKR = torch.from_numpy(packed.codes).view(dtype).view(packed.blocks, K, ROWS)
    full = N // ROWS
    view_BKR[:full] = weight_NK[: full * ROWS].view(full, ROWS, K).transpose(1, 2)
    if N % ROWS:
        view_BKR[full, :, : N % ROWS] = weight_NK[full * ROWS :].T
    return packed


def from_gguf(kind: str, raw: np.ndarray, shape: tuple[int, int]) -> Packed:
    """A matrix [N, K] from GGUF's blocks, uint8, row by row: copied, never made floats.

    Raises VicugnaError for an unknown kind, or if the bytes are not those of the shape.
    """
    N, K = shape
    form = _format(kind, K)
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    if raw.nbytes != N * K // form.columns * form.block_bytes:
        raise VicugnaError(f"{raw.nbytes} bytes are not {N} x {K} weights of {kind}", "weights",
                           "The file may be broken")
    packed = _empty(form, N, K)
    run(program([Instruction(packing.relay(form.number), (
        address(raw), N, K, address(packed.codes), address(packed.scales)))]))
    return packed


def matmul(x_MK: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [M, N] in x's dtype (float32, bfloat16 or float16), summed in float32.
    With weights of blocks, x is rounded to int8 with a scale for every 32 columns.

    Raises VicugnaError if x is not of the weights' width.
    """
    N, K = packed.shape
    if x_MK.shape[1] != K:
        raise VicugnaError(f"activations of width {x_MK.shape[1]}, weights of {K}", "matmul")
    M, width = len(x_MK), packed.blocks * ROWS
    x = x_MK.detach().float().contiguous()
    y_MN = torch.empty(M, width)
    if bias is not None:
        bias = F.pad(bias.detach().float(), (0, width - N)).contiguous()
    rows = torch.empty(M * product.row_bytes(packed.format.number, K), dtype=torch.uint8)
    run(program(products(x.data_ptr(), M, K, rows.data_ptr(), [
        Target(packed, y_MN.data_ptr(), 4 * width, 0 if bias is None else bias.data_ptr())])))
    return y_MN[:, :N].to(x_MK.dtype)


class Target(NamedTuple):
    """A matrix, the address of its product, bytes from one row of that to the next, and the address
    of the bias or 0."""

    packed: Packed
    y: int
    y_row: int
    bias: int = 0


def products(x: int, M: int, K: int, rows: int, targets: Sequence[Target]) -> list[Instruction]:
    """Products of activations at x, float32 [M, K], with some matrices; at `rows` is memory for
    `product.row_bytes` of each token. Threads wait after the last product of each format."""
    made = []
    for number in dict.fromkeys(target.packed.format.number for target in targets):
        given = x
        if not BY_NUMBER[number].is_float:
            made.append(Instruction(product.quantise(number), (x, M, K, rows)))
            given = rows
        same = [target for target in targets if target.packed.format.number == number]
        made += [Instruction(product.product(number), (
            given, M, K, address(one.packed.codes), address(one.packed.scales), one.packed.blocks,
            one.y, one.y_row, one.bias), wait=one is same[-1]) for one in same]
    return made


def rows(packed: Packed, numbers: Tensor) -> Tensor:
    """The rows of these numbers (int64, any shape) as float32 [..., K]: an embedding.

    Raises VicugnaError for a number out of range.
    """
    N, K = packed.shape
    chosen = numbers.to(torch.int64).flatten().contiguous()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < N:
        raise VicugnaError(f"row {int(chosen.max())} of {N}", "embedding")
    out = torch.empty(len(chosen), K)
    run(program([Instruction(packing.dequantise(packed.format.number), (
        chosen.data_ptr(), len(chosen), K, address(packed.codes), address(packed.scales),
        out.data_ptr()))]))
    return out.view(*numbers.shape, K)


def _format(kind: str, columns: int) -> Format:
    if kind not in FORMATS:
        raise VicugnaError(f"unknown format of weights {kind!r}", "weights",
                           did_you_mean(kind, FORMATS))
    if columns % FORMATS[kind].columns:
        raise VicugnaError(f"{columns} columns are no multiple of {FORMATS[kind].columns}", kind,
                           "Choose another format for this matrix")
    return FORMATS[kind]


def _empty(form: Format, N: int, K: int) -> Packed:
    memory = ARENA.allocate(form.nbytes(N, K))
    codes = -(-N // ROWS) * form.code_bytes(K)
    return Packed(form, (N, K), memory[:codes], memory[codes:])


def address(array: np.ndarray) -> int:
    """Where its first number is."""
    return int(array.ctypes.data)


# ---- quantisation, float32 [n, K] -> GGUF's blocks

def _halves(scale: Tensor) -> np.ndarray:
    """float16 numbers as bytes [..., 2]."""
    return scale.half().numpy()[..., None].view(np.uint8)


def _q4_0(x_nK: Tensor) -> np.ndarray:
    """The number of largest magnitude becomes -8."""
    x = x_nK.view(len(x_nK), -1, 32)
    scale = x.gather(2, x.abs().argmax(2, keepdim=True)) / -8
    codes = (x * _inverse(scale) + 8.5).to(torch.int32).clamp(0, 15)
    return _blocks(_halves(scale[..., 0]), _nibbles(codes))


def _q4_1(x_nK: Tensor) -> np.ndarray:
    """The smallest number becomes 0, the largest 15."""
    x = x_nK.view(len(x_nK), -1, 32)
    least = x.amin(2, keepdim=True)
    scale = (x.amax(2, keepdim=True) - least) / 15
    codes = ((x - least) * _inverse(scale) + 0.5).to(torch.int32).clamp(0, 15)
    return _blocks(_halves(scale[..., 0]), _halves(least[..., 0]), _nibbles(codes))


def _q8_0(x_nK: Tensor) -> np.ndarray:
    """The largest magnitude becomes 127."""
    x = x_nK.view(len(x_nK), -1, 32)
    scale = x.abs().amax(2, keepdim=True) / 127
    codes = (x * _inverse(scale)).round().to(torch.int8)
    return _blocks(_halves(scale[..., 0]), codes.numpy().view(np.uint8))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _nibbles(codes: Tensor) -> np.ndarray:
    return (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8).numpy()


def _blocks(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)


QUANTISERS = {"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0}

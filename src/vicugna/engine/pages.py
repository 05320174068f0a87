"""The paged KV cache: the attention context of a network while it generates.

A step runs the tokens of all its sequences as one flat row [1, N]. Keys, values and the inputs of
the convolution go into the pages of the blocks that each sequence holds (blocks.py), and attention
reads them there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vicugna.engine import cpu
from vicugna.engine.blocks import BLOCK, Pool
from vicugna.engine.paged_attention import Places, paged_attention
from vicugna.models.layers.mask import Span


@dataclass
class LayerShape:
    """What one layer keeps of a token: key heads and widths, where `key` 0 means that the keys are
    the values (MLA's latent), and `conv` rows of the convolution's input, `width` wide and of
    `conv_dtype`."""

    span: Span = field(default_factory=Span)
    heads: int = 0
    key: int = 0
    value: int = 0
    dtype: torch.dtype = torch.float32
    conv: int = 0
    width: int = 0
    conv_dtype: torch.dtype = torch.float32


class _Recorder:
    """An attention context that computes nothing: it records what each layer keeps."""

    has_kv_cache = True

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        shape = self.layers.setdefault(layer, LayerShape())
        shape.conv, shape.width, shape.conv_dtype = n, x_BTD.shape[2], x_BTD.dtype
        return x_BTD.new_zeros(*x_BTD.shape[:2], n, x_BTD.shape[2])

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span, scale: float | None = None) -> Tensor:
        shape, values = self.layers.setdefault(layer, LayerShape()), k_BTGK
        if v_BTGK is not None:
            values, shape.key = v_BTGK, k_BTGK.shape[3]
        shape.span, shape.dtype = span, values.dtype
        shape.heads, shape.value = values.shape[2:]
        return q_BTHK.new_zeros(*q_BTHK.shape[:3], shape.value)


_SHAPES: WeakKeyDictionary[nn.Module, tuple[Any, list[LayerShape]]] = WeakKeyDictionary()


@torch.no_grad()
def layer_shapes(network: nn.Module) -> list[LayerShape]:
    """What each layer keeps, found by running one token; once for each network and dtype. Beside
    matrices packed in 16 bits or fewer, keys and values are float16, as in llama.cpp: of 11 bits,
    and half as much to read for every token."""
    weight = next(network.parameters())
    known = _SHAPES.get(network)
    if known is None or known[0] != (weight.dtype, weight.device):
        recorder, token = _Recorder(), torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        network(token, token, recorder)
        shapes = [recorder.layers[layer] for layer in sorted(recorder.layers)]
        packed: list[Any] = [module.packed for module in network.modules()
                             if hasattr(module, "packed")]
        if packed and all(matrix.format.bits <= 16 for matrix in packed):
            for shape in shapes:
                shape.dtype = torch.float16
        _SHAPES[network] = known = (weight.dtype, weight.device), shapes
    return known[1]


def conv_span(layers: list[LayerShape]) -> Span:
    """The kind of blocks that hold the convolution's inputs: the shortest window of the layers that
    is long enough, or else one of its own."""
    rows = max((layer.conv for layer in layers), default=0)
    windows = [layer.span.window for layer in layers if layer.span.chunk is None]
    return Span(min((w for w in windows if w is not None and w > rows), default=rows + 1))


def block_bytes(layers: list[LayerShape]) -> dict[Span, int]:
    """Bytes of one block of each kind."""
    sizes: dict[Span, int] = {}
    for layer in layers:
        own = BLOCK * layer.heads * (layer.key + layer.value) * layer.dtype.itemsize
        sizes[layer.span] = sizes.get(layer.span, 0) + own
        if layer.conv:
            span = conv_span(layers)
            sizes[span] = sizes.get(span, 0) + BLOCK * layer.width * layer.conv_dtype.itemsize
    return sizes


class Pages:
    """The memory of all blocks. Of each layer: `keys` [blocks, G, K, 16], `values`
    [blocks, G, 16, U], and `rows` [blocks * 16, D], the inputs of its convolution."""

    def __init__(self, layers: list[LayerShape], pools: list[Pool], device: torch.device) -> None:
        self.layers, self.conv_span = layers, conv_span(layers)
        self.pools = {pool.span: pool for pool in pools}
        self.keys: list[Tensor | None] = []
        self.values: list[Tensor] = []
        self.rows: list[Tensor | None] = []
        self._compiled = device.type == "cpu" and cpu.available()
        for layer in layers:
            blocks, G = self.pools[layer.span].blocks, layer.heads
            self.keys.append(_zeros((blocks, G, layer.key, BLOCK), layer.dtype, device)
                             if layer.key else None)
            self.values.append(_zeros((blocks, G, BLOCK, layer.value), layer.dtype, device))
            self.rows.append(_zeros((self.pools[self.conv_span].blocks * BLOCK, layer.width),
                                    layer.conv_dtype, device) if layer.conv else None)

    def attention(self, layer: int, q_NHK: Tensor, place: Places, scale: float) -> Tensor:
        """Attention over the pages of a layer, [N, H, U]: compiled where that takes them."""
        keys, values = self.keys[layer], self.values[layer]
        if self._compiled:
            from vicugna.engine.cpu import attention  # which needs numba
            if attention.takes(keys, values):
                return attention.paged(q_NHK, keys, values, place.starts, place.lengths,
                                       place.tables, place.first, place.span.window,
                                       place.span.chunk, scale)
        return paged_attention(q_NHK, keys, values, place, scale)

    def copy(self, span: Span, source: int, target: int) -> None:
        """Copy a block of one kind."""
        for layer, keys, values, rows in zip(self.layers, self.keys, self.values, self.rows,
                                             strict=True):
            if layer.span == span:
                values[target] = values[source]
                if keys is not None:
                    keys[target] = keys[source]
            if rows is not None and self.conv_span == span:
                rows[target * BLOCK : (target + 1) * BLOCK] = rows[
                    source * BLOCK : (source + 1) * BLOCK]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, on a CPU without touching the memory until it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class Paged:
    """The `Attend` of one step: where its tokens are in the pages, for each kind of layers."""

    has_kv_cache = True

    def __init__(self, pages: Pages, slots: Iterable[int], counts_R: np.ndarray,
                 computed_R: np.ndarray, device: torch.device) -> None:
        """Sequence r, in slot `slots[r]`, has `computed_R[r]` keys already and `counts_R[r]` new
        tokens."""
        self.pages = pages
        rows_R = np.fromiter(slots, np.int64)
        starts_R = np.concatenate([[0], counts_R.cumsum()])
        row_N = np.repeat(np.arange(len(counts_R)), counts_R)
        self.positions_N = np.arange(len(row_N)) - (starts_R[:-1] - computed_R)[row_N]
        self.last_R = starts_R[1:] - 1
        self.places = {
            span: Places(span, pool.table, pool.first[rows_R], rows_R, starts_R,
                         computed_R + counts_R, row_N, self.positions_N, device)
            for span, pool in pages.pools.items()}

    def conv_state(self, layer: int, x_1ND: Tensor, n: int) -> Tensor:
        """The n rows before each token, [1, N, n, D]; `x` is kept."""
        rows, place = self.pages.rows[layer], self.places[self.pages.conv_span]
        if rows is None:
            return x_1ND.new_zeros(*x_1ND.shape[:2], 0, x_1ND.shape[2])
        rows.index_copy_(0, place.slots_N, x_1ND[0])
        past = rows.index_select(0, place.earlier_slots(n))
        return past.view(1, -1, n, x_1ND.shape[2])

    def __call__(self, layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGU: Tensor | None,
                 span: Span, scale: float | None = None) -> Tensor:
        """Keep the new keys and values, attend over all that is visible: [1, N, H, U]."""
        place = self.places[span]
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        if keys is not None and v_1NGU is not None:
            keys[place.blocks_N, :, :, place.offsets_N] = k_1NGK[0].to(keys.dtype)
            values[place.blocks_N, :, place.offsets_N] = v_1NGU[0].to(values.dtype)
        else:
            values[place.blocks_N, :, place.offsets_N] = k_1NGK[0].to(values.dtype)
        scale = q_1NHK.shape[3] ** -0.5 if scale is None else scale
        return self.pages.attention(layer, q_1NHK[0], place, scale)[None]

"""The fused step: all layers of a dense decoder with packed weights as one program.

`lower` makes it from the network's own modules, for Llama and what shares its layers (Mistral,
Qwen2). Other networks run module by module.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vicugna.engine.cpu import operations, packing, product
from vicugna.engine.cpu.attention import DTYPES, Metadata, attend, bits, scratch_of
from vicugna.engine.cpu.formats import ROWS
from vicugna.engine.cpu.linear import Target, address, products
from vicugna.engine.cpu.threads import Instruction, program, run
from vicugna.engine.packed import PackedEmbedding, PackedLinear
from vicugna.models import llama
from vicugna.models.layers.mlp import SwiGLU

POSITIONS = 1024  # of RoPE's table, at least
TOKENS = 1 << 62  # stands in a program for the number of tokens


def lower(network: Any, pages: Any) -> "Step | None":
    """The fused step of a network over these pages, or None if it has parts that no operation
    covers."""
    layers = getattr(getattr(network, "model", None), "layers", ())
    covered = layers and all(map(_covered, layers)) and isinstance(
        network.model.embed_tokens, PackedEmbedding)
    return Step(network.model, pages) if covered else None


def _covered(layer: nn.Module) -> bool:
    if type(layer) is not llama.Layer:
        return False
    attention, feed_forward = layer.self_attn, getattr(layer, layer.mlp_name)
    return (type(attention) is llama.Attention and type(feed_forward) is SwiGLU
            and attention.K % 32 == 0 and all(
                isinstance(x, PackedLinear) and x.out_features % ROWS == 0
                and x.in_features % 32 == 0 for x in _matrices(layer)))


def _matrices(layer: Any) -> list[Any]:
    attention, feed_forward = layer.self_attn, getattr(layer, layer.mlp_name)
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj]


class Step:
    """`hidden_ND = step(tokens_N, positions_N, attend)`: as the decoder."""

    _given: np.ndarray  # tokens and positions
    _metadata: np.ndarray  # of each kind of layers, the operands of a `Metadata`
    _program: np.ndarray
    _counts: tuple[np.ndarray, ...]  # places in it that hold the number of tokens
    _tokens: int  # that number now
    _out: Tensor

    def __init__(self, decoder: Any, pages: Any) -> None:
        self._decoder, self._pages = decoder, pages
        self._room = self._threads = self._positions = 0
        self._spans = list({layer.self_attn.span: None for layer in decoder.layers})

    def __call__(self, tokens_N: np.ndarray, positions_N: np.ndarray, attend: Any) -> Tensor:
        """Final hidden states [N, D] of tokens at positions, both int64. Keys and values go into
        the pages, at the places of `attend` (pages.Paged). They hold until the next call."""
        N, last = len(tokens_N), int(positions_N.max())
        if (self._room < N or last >= self._positions
                or self._threads != torch.get_num_threads()):
            self._build(max(self._room, N), max(self._positions, last + 1, POSITIONS))
        self._given[0, :N], self._given[1, :N] = tokens_N, positions_N
        kept = []
        for span, operands in zip(self._spans, self._metadata, strict=True):
            place = attend.places[span]
            kept.append(Metadata(place.starts, place.lengths, place.tables, place.first,
                              place.block_N, place.offset_N))
            operands[:] = kept[-1].operands
        if self._tokens != N:
            self._program[self._counts] = self._tokens = N
        run(self._program)
        return self._out[:N]

    def _build(self, room: int, positions: int) -> None:
        """The program of a step of at most `room` tokens, all before `positions`, and its memory:
        both rounded up to a power of two."""
        self._room, self._positions = (1 << (n - 1).bit_length() for n in (room, positions))
        room, self._threads, self._tokens = self._room, torch.get_num_threads(), 0
        layers = self._decoder.layers
        attention, gate = layers[0].self_attn, _matrices(layers[0])[4]
        D, F, H, G, K = (gate.in_features, gate.out_features, attention.H, attention.G,
                         attention.K)
        width = (H + 2 * G) * K
        self._metadata = np.zeros((len(self._spans), 8), np.int64)
        x, second, h, self._out = (torch.empty(room, D) for _ in range(4))
        self._given = np.zeros((2, room), np.int64)
        cos, sin = (x[0, :, 0].contiguous() for x in self._decoder.rotation(
            torch.arange(self._positions)[None], torch.float32))
        qkv, heads = torch.empty(room, width), torch.empty(room, H * K)
        gates, inner = torch.empty(room, 2 * F), torch.empty(room, F)
        numbers = {module.packed.format.number for layer in layers for module in _matrices(layer)}
        rows = torch.empty(room * max(product.row_bytes(number, max(D, F, H * K))
                                      for number in numbers), dtype=torch.uint8)
        scratch = scratch_of(K)
        kept: list[Tensor] = []
        made: list[Instruction] = []

        def floats(parameter: Tensor) -> int:
            """The address of a parameter as float32."""
            kept.append(parameter.detach().float().contiguous())
            return kept[-1].data_ptr()

        def multiply(source: Tensor, *targets: tuple[Any, Tensor, int]) -> None:
            """Products of the rows of `source`, each to a tensor from one of its columns on."""
            if any(module.packed.format.is_float for module, _, _ in targets):
                made[-1] = made[-1]._replace(wait=True)  # every thread reads all columns
            made.extend(products(source.data_ptr(), TOKENS, source.shape[1], rows.data_ptr(), [
                Target(module.packed, out.data_ptr() + 4 * at, 4 * out.shape[1],
                       0 if module.bias is None else floats(module.bias))
                for module, out, at in targets]))

        def normalise(before: Tensor, added: Tensor | None, total: Tensor, norm: Any, out: Tensor
                      ) -> None:
            made.append(Instruction(operations.normalise, (
                before.data_ptr(), 0 if added is None else added.data_ptr(), total.data_ptr(),
                TOKENS, D, floats(norm.weight), bits(norm.eps), out.data_ptr()), wait=False))

        table, added = self._decoder.embed_tokens.packed, None
        made.append(Instruction(packing.dequantise(table.format.number), (
            address(self._given), TOKENS, D, address(table.codes), address(table.scales),
            x.data_ptr())))
        for n, layer in enumerate(layers):
            q, k, v, o, gate, up, down = _matrices(layer)
            metadata = address(self._metadata[self._spans.index(layer.self_attn.span)])
            keys, values = self._pages.keys[n], self._pages.values[n]
            dtype, span = DTYPES[values.dtype], layer.self_attn.span
            normalise(x, added, second, layer.input_layernorm, self._out)
            multiply(self._out, (q, qkv, 0), (k, qkv, H * K), (v, qkv, (H + G) * K))
            made += [
                Instruction(operations.rotate, (
                    qkv.data_ptr(), 4 * width, TOKENS, address(self._given[1]), H, G, K,
                    cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), dtype,
                    metadata)),
                Instruction(attend(dtype, False), (
                    qkv.data_ptr(), 4 * width, keys.data_ptr(), values.data_ptr(), metadata, H, G,
                    K, K, span.window or 0, span.chunk or 0, heads.data_ptr(), address(scratch),
                    scratch.strides[0], bits(K**-0.5)))]
            multiply(heads, (o, h, 0))
            normalise(second, h, x, layer.post_attention_layernorm, self._out)
            multiply(self._out, (gate, gates, 0), (up, gates, F))
            made.append(Instruction(operations.swiglu, (
                gates.data_ptr(), TOKENS, F, inner.data_ptr()), wait=False))
            multiply(inner, (down, h, 0))
            added = h
        normalise(x, added, second, self._decoder.norm, self._out)
        self._program = program(made)
        self._counts = np.nonzero(self._program == TOKENS)
        self._kept = x, second, h, cos, sin, qkv, heads, gates, inner, rows, scratch, kept

"""The fused step: all layers of a dense decoder with packed weights as one program.

`lower` makes it from the network's own modules, for Llama and what shares its layers (Mistral,
Qwen2). Other networks run module by module.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vicugna.engine.cpu import operations, product
from vicugna.engine.cpu.attention import DTYPES, Where, attend, bits, scratch_of
from vicugna.engine.cpu.formats import ROWS
from vicugna.engine.cpu.linear import Target, address, products
from vicugna.engine.cpu.threads import Instruction, program, run
from vicugna.engine.packed import PackedLinear
from vicugna.models import llama
from vicugna.models.layers.mlp import SwiGLU

TOKENS = 1 << 62  # stands in a program for the number of tokens


def lower(network: Any, pages: Any) -> "Step | None":
    """The fused step of a network over these pages, or None if it has parts that no operation
    covers."""
    layers = getattr(getattr(network, "model", None), "layers", ())
    return Step(network.model, pages) if layers and all(map(_covered, layers)) else None


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
    """`hidden_ND = step(x_ND, positions_N, attend)`: as the decoder's layers and its last norm."""

    def __init__(self, decoder: Any, pages: Any) -> None:
        self._decoder, self._pages = decoder, pages
        self._room, self._threads = 0, 0
        self._spans = list({layer.self_attn.span: None for layer in decoder.layers})

    def __call__(self, x_ND: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        """Keys and values go into the pages, at the places of `attend` (pages.Paged)."""
        N = len(x_ND)
        if self._room < N or self._threads != torch.get_num_threads():
            self._build(1 << (N - 1).bit_length())
        cos, sin = self._decoder.rotation(positions_N[None], torch.float32)
        self._x[:N], self._cos[:N], self._sin[:N] = x_ND, cos[0, :, 0], sin[0, :, 0]
        kept = []
        for span, operands in zip(self._spans, self._where, strict=True):
            place = attend.places[span]
            kept.append(Where(place.starts, place.lengths, place.tables, place.first,
                              place.blocks_N, place.offsets_N))
            operands[:] = kept[-1].operands
        self._program[self._counts] = N
        run(self._program)
        return self._out[:N].to(x_ND.dtype)

    def _build(self, room: int) -> None:
        """The program of a step of at most `room` tokens, and its memory."""
        self._room, self._threads = room, torch.get_num_threads()
        layers = self._decoder.layers
        attention, gate = layers[0].self_attn, _matrices(layers[0])[4]
        D, F, H, G, K = (gate.in_features, gate.out_features, attention.H, attention.G,
                         attention.K)
        width = (H + 2 * G) * K
        self._where = np.zeros((len(self._spans), 8), np.int64)
        self._x, second, h, self._out = (torch.empty(room, D) for _ in range(4))
        self._cos, self._sin = torch.empty(room, K // 2), torch.empty(room, K // 2)
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

        def normalise(x: Tensor, added: Tensor | None, total: Tensor, norm: Any, out: Tensor
                      ) -> None:
            made.append(Instruction(operations.normalise, (
                x.data_ptr(), 0 if added is None else added.data_ptr(), total.data_ptr(), TOKENS, D,
                floats(norm.weight), bits(norm.eps), out.data_ptr()), wait=False))

        added, x = None, self._x
        for n, layer in enumerate(layers):
            q, k, v, o, gate, up, down = _matrices(layer)
            where = address(self._where[self._spans.index(layer.self_attn.span)])
            keys, values = self._pages.keys[n], self._pages.values[n]
            dtype, span = DTYPES[values.dtype], layer.self_attn.span
            normalise(x, added, second, layer.input_layernorm, self._out)
            multiply(self._out, (q, qkv, 0), (k, qkv, H * K), (v, qkv, (H + G) * K))
            made += [
                Instruction(operations.rotate, (
                    qkv.data_ptr(), 4 * width, TOKENS, H, G, K, self._cos.data_ptr(),
                    self._sin.data_ptr(), keys.data_ptr(), values.data_ptr(), dtype, where)),
                Instruction(attend(dtype, False), (
                    qkv.data_ptr(), 4 * width, keys.data_ptr(), values.data_ptr(), where, H, G, K,
                    K, span.window or 0, span.chunk or 0, heads.data_ptr(), address(scratch),
                    scratch.strides[0], bits(K**-0.5)))]
            multiply(heads, (o, h, 0))
            normalise(second, h, self._x, layer.post_attention_layernorm, self._out)
            multiply(self._out, (gate, gates, 0), (up, gates, F))
            made.append(Instruction(operations.swiglu, (
                gates.data_ptr(), TOKENS, F, inner.data_ptr()), wait=False))
            multiply(inner, (down, h, 0))
            added = h
        normalise(self._x, added, second, self._decoder.norm, self._out)
        self._program = program(made)
        self._counts = np.nonzero(self._program == TOKENS)
        self._kept = second, h, qkv, heads, gates, inner, rows, scratch, kept

"""Scaled dot-product attention, and the attention context that a network is given.

A network never holds keys or values itself: it is given `attend`, and calls it once per layer.
Training passes `Dense` from this file; the engine passes one over its cache.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.models.layers import flex
from vicugna.models.layers.mask import Span, additive

BLOCK = 128  # queries of a block on CPU
LONGEST_BLOCKED = 2048  # tokens; beyond, memory matters more than the speed of blocks
WIDE = 256  # longer windows go by blocks of as many queries


class Attend(Protocol):
    """An attention context: it alone holds the KV cache and the convolution state.

    `has_kv_cache` says whether keys and values are kept between calls: multi-head latent attention
    then passes the compressed latent instead of expanded keys and values.
    """

    has_kv_cache: bool

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span, scale: float | None = None) -> Tensor:
        """Causal attention of T new queries over cached and new keys: [B, T, H, width of values].

        H is a multiple of G; scores are multiplied by `scale`, None meaning 1/sqrt(K). Values may
        be of another width than keys; None means that the keys are the values too.
        """

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        """The convolution state of `layer`: the n rows of its convolution's input that precede `x`,
        [B, n, D]; or, where a row of the batch holds several sequences, the n rows that precede
        each token, [B, T, n, D]. Earliest first; zeros before the start of a sequence."""


class Dense:
    """Attention over exactly the tokens of one call: training, and the reference for caches.

    `positions_BT` separates documents packed in a row: a document begins where positions restart
    at 0, and no token attends to another document. None means one document a row. On CUDA, layers
    of one of the `spans` attend block-sparsely (flex.py) where documents, windows or chunks leave
    keys out; without FlexAttention, masks [B, T, T] do that.
    """

    has_kv_cache = False

    def __init__(self, positions_BT: Tensor | None = None, spans: Iterable[Span] = ()) -> None:
        self.start_BT: Tensor | None = None  # index of the first token of each token's document
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._block_masks: dict[Span, Any] = {}
        self._flex = None if positions_BT is None else flex.kernel(positions_BT.device)
        if positions_BT is not None:
            query_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
            start_BT = query_T - positions_BT
            if bool(start_BT.any()):
                self.start_BT = start_BT
            if self._flex:  # here, as inside a compiled layer it would break the graph
                self._block_masks = {span: flex.block_mask(span.first_key(query_T, start_BT))
                                     for span in spans}

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        return x_BTD.new_zeros(x_BTD.shape[0], n, x_BTD.shape[2])

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span, scale: float | None = None) -> Tensor:
        values_BTGK = k_BTGK if v_BTGK is None else v_BTGK
        scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, values_BTGK))
        T, window, chunk = q.shape[2], span.window or q.shape[2], span.chunk or q.shape[2]
        # Chunks of a single document are rows of their own, each causal.
        causal = window >= T and (chunk >= T or self.start_BT is None)
        sparse = self.start_BT is not None or not causal
        if sparse and span in self._block_masks and flex.takes(q, v):
            return self._block_sparse(q, k, v, span, scale).transpose(1, 2)
        if WIDE < window < T:
            return self._windowed(q, k, v, window, scale).transpose(1, 2)
        if 2 * window < T:
            return self._banded(q, k, v, window, scale).transpose(1, 2)
        if not causal:
            return _masked(q, k, v, self._mask(range(T), range(T), span, q), scale).transpose(1, 2)
        if chunk >= T:
            return self._causal(q, k, v, scale).transpose(1, 2)
        parts = zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True)
        outs = [self._causal(q, k, v, scale) for q, k, v in parts]
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _block_sparse(self, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> Tensor:
        """FlexAttention, which skips blocks that no query of it attends to."""
        assert self._flex is not None
        # Under autocast, queries and keys that RoPE has rotated are float32.
        return self._flex(q.to(v.dtype), k.to(v.dtype), v, block_mask=self._block_masks[span],
                          scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention to every earlier position of the document."""
        T = q.shape[2]
        if v.device.type == "cpu" and v.dtype == torch.bfloat16 and T <= LONGEST_BLOCKED:
            # Under autocast, queries and keys that RoPE has rotated are float32.
            return self._blocked(q.to(v.dtype), k.to(v.dtype), v, scale)
        return _masked(q, k, v, None if self.start_BT is None
                       else self._mask(range(T), range(T), Span(), q), scale)

    def _mask(self, queries: range, keys: range, span: Span, like: Tensor) -> Tensor:
        """Additive mask [B or 1, 1, queries, keys]."""
        if self.start_BT is None:  # only distances count: equal blocks share one
            queries, keys = (range(x.start - keys.start, x.stop - keys.start)
                             for x in (queries, keys))
        place = (span, like.dtype, queries, keys)
        if place not in self._masks:
            query = torch.arange(queries.start, queries.stop, device=like.device)
            key = torch.arange(keys.start, keys.stop, device=like.device)
            start = (query.new_zeros(1, 1) if self.start_BT is None
                     else self.start_BT[:, queries.start : queries.stop])
            mask = span.mask(query, key, start).view(-1, 1, len(query), len(key))
            self._masks[place] = additive(mask, like.dtype)
        return self._masks[place]

    def _blocked(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scale: float) -> Tensor:
        """Causal attention by blocks of queries, each over the keys up to its end.

        On CPU in bfloat16, quicker to train with than PyTorch's kernel (benchmarks/attention.py),
        for the memory of the probabilities: about B * H * T * T / 2 of them.
        """
        B, H, T, K = q_BHTK.shape
        G, C = k_BGTK.shape[1], min(BLOCK, T)
        q = (q_BHTK * scale).reshape(B, G, H // G, T, K)
        after = torch.full((C, C), float("-inf"), dtype=q.dtype).triu(1)
        out = []
        for start in range(0, T, C):
            n = min(C, T - start)
            end = start + n
            rows = q[:, :, :, start:end].reshape(B, G, H // G * n, K)
            scores = (rows @ k_BGTK[:, :, :end].transpose(-1, -2)).view(B, G, H // G, n, end)
            if self.start_BT is None:
                scores[..., start:] += after[:n, :n]
            else:
                scores += self._mask(range(start, end), range(end), Span(), q)[:, :, None]
            p = scores.softmax(-1).reshape(B, G, H // G * n, end)
            out.append((p @ v_BGTK[:, :, :end]).view(B, G, H // G, n, -1))
        return torch.cat(out, dim=3).reshape(B, H, T, -1)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, W: int, scale: float) -> Tensor:
        """Sliding window by blocks of queries, each over the keys in any of their windows: scores
        take memory for one block, however long the sequence."""
        T, out = q.shape[2], []
        for start in range(0, T, WIDE):
            first, end = max(0, start - W + 1), min(start + WIDE, T)
            mask = self._mask(range(start, end), range(first, end), Span(W), q)
            out.append(_masked(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask,
                               scale))
        return torch.cat(out, dim=2)

    def _banded(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, W: int, scale: float
                ) -> Tensor:
        """Sliding window in blocks of W queries, each over the keys of its block and of the one
        before: T * 2W scores instead of T * T."""
        B, H, T, K = q_BHTK.shape
        G, n = k_BGTK.shape[1], -(-T // W)
        spare = n * W - T
        q = F.pad(q_BHTK, (0, 0, 0, spare)).reshape(B, G, H // G, n, W, K)
        k, v = (F.pad(x, (0, 0, W, spare)).reshape(B, G, 1, n + 1, W, -1)
                for x in (k_BGTK, v_BGTK))
        k, v = (torch.cat([x[:, :, :, :-1], x[:, :, :, 1:]], dim=4) for x in (k, v))
        scores = (q * scale) @ k.transpose(-1, -2) + self._band_mask(T, W, q)
        return (scores.softmax(-1) @ v).reshape(B, H, n * W, -1)[:, :, :T]

    def _band_mask(self, T: int, W: int, like: Tensor) -> Tensor:
        """Additive mask [B or 1, 1, 1, n, W, 2W] of `_banded`."""
        place = (Span(W), like.dtype)
        if place not in self._masks:
            n = -(-T // W)
            query_nW = torch.arange(n * W, device=like.device).reshape(n, W)
            key_n2W = query_nW[:, :1] - W + torch.arange(2 * W, device=like.device)
            start = (query_nW.new_zeros(1, n, W) if self.start_BT is None
                     else F.pad(self.start_BT.clamp(min=0), (0, n * W - T)).reshape(-1, n, W))
            mask = Span(W).mask(query_nW, key_n2W, start)[:, None, None]
            self._masks[place] = additive(mask, like.dtype)
        return self._masks[place]


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention under an additive mask; causal without one."""
    K, U = q.shape[3], v.shape[3]
    if q.device.type == "cpu" and K != U:  # else its kernel would hold all T * S scores
        q, k, v = (F.pad(x, (0, max(K, U) - x.shape[3])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale,
                                          enable_gqa=q.shape[1] != k.shape[1])[..., :U]


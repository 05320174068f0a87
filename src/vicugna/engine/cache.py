"""Attention over remembered keys and values: what a network is given while it generates.

Rows of a batch are left-padded, so that their newest tokens share a column. Layers that see
everything keep every column; layers with a window or chunks forget what no later token can see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.models.layers.attention import Span, additive

# Spare columns when a buffer grows. A step reads all columns anyway, so copying them once every
# 256 steps costs under one percent, without the memory that doubling would waste.
_SPARE = 256
# Queries of a long call that meet their keys at a time: bounds the mask, skips invisible keys.
_BLOCK, _WINDOW_BLOCK = 256, 64


class _Store:
    """One layer's keys, and values unless they are the keys: buffers [B, G, capacity, width], of
    which `filled` columns are in use."""

    def __init__(self, span: Span, parts: list[Tensor]) -> None:
        self.span, self.reach = span, span.window or span.chunk
        self.columns = 0  # seen since the start, forgotten ones included
        self.filled = 0
        self.kept = [x.new_empty(x.shape[0], x.shape[2], 0, x.shape[3]) for x in parts]

    def append(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take T new columns; return all that the new queries may see, as views [B, G, S, width]:
        keys and values."""
        T = parts[0].shape[1]
        retained = self.filled if self.reach is None else min(self.filled, self.reach - 1)
        if self.filled + T > self.kept[0].shape[2]:
            old = [x[:, :, self.filled - retained : self.filled] for x in self.kept]
            self.kept = [torch.cat([x, x.new_empty(*x.shape[:2], T + _SPARE, x.shape[3])], dim=2)
                         for x in old]
            self.filled = retained
        start, stop = self.filled, self.filled + T
        for kept, new in zip(self.kept, parts, strict=True):
            kept[:, :, start:stop] = new.transpose(1, 2)
        self.filled, self.columns = stop, self.columns + T
        seen = [x[:, :, start - retained : stop] for x in self.kept]
        return seen[0], seen[-1]


class Cache:
    """An `Attend` that remembers: call the network again and again with the tokens that follow.

    `pads[b]` columns at the start of row b are padding and are never seen by its tokens; give
    them position 0. Memory per row and token: 2 * G * K elements for each layer without a window;
    a windowed layer holds at most window + T + 256 columns, T being the longest recent call.
    Results are those of attention over the whole sequence, whatever the split into calls.
    """

    has_kv_cache = True

    def __init__(self, pads: list[int], device: torch.device | str = "cpu") -> None:
        self._pads_B = torch.tensor(pads, device=device)
        self._most_pads = max(pads)
        self._stores: dict[int, _Store] = {}
        self._conv_states: dict[int, Tensor] = {}
        self._corners: dict[int | None, Tensor] = {}
        self._step_masks: dict[tuple[int, int, int | None], Tensor] = {}

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        """The n rows of the convolution's input that precede `x`: [B, n, D], zeros at the start."""
        if layer not in self._conv_states:
            self._conv_states[layer] = x_BTD.new_zeros(x_BTD.shape[0], n, x_BTD.shape[2])
        past_BnD = self._conv_states[layer]
        if n > 0:
            recent = x_BTD if x_BTD.shape[1] >= n else torch.cat([past_BnD, x_BTD], dim=1)
            self._conv_states[layer] = recent[:, -n:].clone()  # a view would hold the whole call
        return past_BnD

    def keep(self, rows: list[int]) -> None:
        """Make the batch out of these rows of it: drops finished ones, repeats shared prompts."""
        index = torch.tensor(rows, device=self._pads_B.device)
        self._pads_B = self._pads_B[index]
        self._most_pads = int(self._pads_B.max())
        self._step_masks = {}
        for store in self._stores.values():
            store.kept = [x.index_select(0, index) for x in store.kept]
        self._conv_states = {layer: x_BnD[index] for layer, x_BnD in self._conv_states.items()}

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span) -> Tensor:
        """Append the new keys and values, attend over all that is visible: [B, T, H, width]."""
        parts = [k_BTGK] if v_BTGK is None else [k_BTGK, v_BTGK]
        if layer not in self._stores:
            self._stores[layer] = _Store(span, parts)
        store = self._stores[layer]
        k_BGSK, v_BGSK = store.append(parts)
        B, T, H, K = q_BTHK.shape
        if T > 1:
            return self._many(q_BTHK, k_BGSK, v_BGSK, store)
        # One query a row sees all keys but the padding. Those that share a key head are laid out
        # as if they were positions, so that each key is read once: twice as fast on a CPU as
        # `enable_gqa`.
        G = k_BGSK.shape[1]
        return F.scaled_dot_product_attention(
            q_BTHK.reshape(B, G, H // G, K), k_BGSK, v_BGSK,
            attn_mask=self._step_mask(store, k_BGSK)).reshape(B, 1, H, -1)

    def _many(self, q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, store: _Store) -> Tensor:
        """T queries a row, a block at a time: each block meets only keys it can see."""
        T, S, reach = q_BTHK.shape[1], k_BGSK.shape[2], store.reach
        q_BHTK = q_BTHK.transpose(1, 2)
        block = _BLOCK if reach is None or reach >= 4 * _BLOCK else _WINDOW_BLOCK
        outs = []
        for start in range(0, T, block):
            t = min(block, T - start)
            high = S - T + start + t
            low = 0 if reach is None else max(0, high - t - reach + 1)
            first = store.columns - S + low  # the column of the first key
            mask = self._corner(reach, t, high - low, q_BTHK)
            if self._most_pads > first or store.span.chunk:
                mask = self._by_row(mask, first, store.span.chunk)
            outs.append(F.scaled_dot_product_attention(
                q_BHTK[:, :, start : start + t], k_BGSK[:, :, low:high], v_BGSK[:, :, low:high],
                attn_mask=mask, enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1]))
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _corner(self, window: int | None, t: int, s: int, like: Tensor) -> Tensor:
        """Additive mask [t, s] of the last t queries against the last s keys: seen from the newest
        pair it is always the same, so each is a corner of one matrix."""
        whole = self._corners.get(window)
        if whole is None or whole.shape[0] < t or whole.shape[1] < s:
            query = torch.arange(t, 0, -1, device=like.device)[:, None]  # counted from the end
            key = torch.arange(s + 16 * _SPARE, 0, -1, device=like.device)
            visible = key >= query
            if window is not None:
                visible &= key < query + window
            whole = self._corners[window] = additive(visible, like.dtype)
        # PyTorch's CUDA kernels take a mask that begins anywhere, and then fault on reading it.
        return whole[-t:, -s:] if like.device.type == "cpu" else whole[-t:, -s:].contiguous()

    def _by_row(self, mask_ts: Tensor, first: int, chunk: int | None) -> Tensor:
        """[B, 1, t, s] from [t, s], whose first key is column `first`: padding unseen, and what
        lies before a query's chunk; each sees itself, lest a softmax be empty."""
        key_s = torch.arange(first, first + mask_ts.shape[1], device=mask_ts.device)
        query_t1 = key_s[-mask_ts.shape[0]:, None]
        begin_B11 = self._pads_B[:, None, None]
        if chunk is not None:
            begin_B11 = begin_B11 + ((query_t1 - begin_B11) // chunk).clamp(min=0) * chunk
        visible_Bts = (key_s >= begin_B11) | (key_s == query_t1)
        return torch.where(visible_Bts[:, None], mask_ts, float("-inf"))

    def _step_mask(self, store: _Store, k_BGSK: Tensor) -> Tensor | None:
        """Additive mask [B, 1, 1, S] of one new query a row, shared by layers of a step."""
        S, end, chunk = k_BGSK.shape[2], store.columns, store.span.chunk
        if self._most_pads <= end - S and (chunk is None or end <= chunk):
            return None
        key = S, end, chunk
        if key not in self._step_masks:
            self._step_masks = {k: mask for k, mask in self._step_masks.items() if k[1] == end}
            self._step_masks[key] = self._by_row(k_BGSK.new_zeros(1, S), end - S, chunk)
        return self._step_masks[key]

"""Attention over remembered keys and values: what a network is given while it generates.

Rows of a batch are left-padded, so that their newest tokens share a column. Layers that see
everything keep every column; sliding-window layers forget what no later token can see.
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
    """One layer's keys and values: a buffer [2, B, G, capacity, K], `filled` columns in use."""

    def __init__(self, window: int | None, like_BTGK: Tensor) -> None:
        B, _, G, K = like_BTGK.shape
        self.window = window
        self.columns = 0  # seen since the start, forgotten ones included
        self.filled = 0
        self.kept = like_BTGK.new_empty(2, B, G, 0, K)

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Take T new columns; return all that the new queries may see, as views [B, G, S, K]."""
        T = k_BTGK.shape[1]
        retained = self.filled if self.window is None else min(self.filled, self.window - 1)
        if self.filled + T > self.kept.shape[3]:
            kept = self.kept[:, :, :, self.filled - retained : self.filled]
            spare = kept.new_empty(*kept.shape[:3], T + _SPARE, kept.shape[4])
            self.kept, self.filled = torch.cat([kept, spare], dim=3), retained
        new = slice(self.filled, self.filled + T)
        self.kept[0, :, :, new] = k_BTGK.transpose(1, 2)
        self.kept[1, :, :, new] = v_BTGK.transpose(1, 2)
        self.filled, self.columns = self.filled + T, self.columns + T
        k_BGSK, v_BGSK = self.kept[:, :, :, new.start - retained : new.stop]
        return k_BGSK, v_BGSK


class Cache:
    """An `Attend` that remembers: call the network again and again with the tokens that follow.

    `pads[b]` columns at the start of row b are padding and are never seen by its tokens; give
    them position 0. Memory per row and token: 2 * G * K elements for each layer without a window;
    a windowed layer holds at most window + T + 256 columns, T being the longest recent call.
    Results are those of attention over the whole sequence, whatever the split into calls.
    """

    def __init__(self, pads: list[int], device: torch.device | str = "cpu") -> None:
        self._pads_B = torch.tensor(pads, device=device)
        self._most_pads = max(pads)
        self._stores: dict[int, _Store] = {}
        self._rows: dict[int, Tensor] = {}
        self._corners: dict[int | None, Tensor] = {}
        self._pad_mask: tuple[int, int, Tensor] | None = None

    def before(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        """The n rows of `x` that `layer` saw just before these: [B, n, D], zeros at the start."""
        if layer not in self._rows:
            self._rows[layer] = x_BTD.new_zeros(x_BTD.shape[0], n, x_BTD.shape[2])
        past_BnD = self._rows[layer]
        if n > 0:
            recent = x_BTD if x_BTD.shape[1] >= n else torch.cat([past_BnD, x_BTD], dim=1)
            self._rows[layer] = recent[:, -n:].clone()  # a view would hold the whole call
        return past_BnD

    def keep(self, rows: list[int]) -> None:
        """Make the batch out of these rows of it: drops finished ones, repeats shared prompts."""
        index = torch.tensor(rows, device=self._pads_B.device)
        self._pads_B = self._pads_B[index]
        self._most_pads = int(self._pads_B.max())
        self._pad_mask = None
        for store in self._stores.values():
            store.kept = store.kept.index_select(1, index)
        self._rows = {layer: x_BnD[index] for layer, x_BnD in self._rows.items()}

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor,
                 span: Span) -> Tensor:
        """Append the new keys and values, attend over all that is visible: [B, T, H, K]."""
        if layer not in self._stores:
            self._stores[layer] = _Store(span.window, k_BTGK)
        store = self._stores[layer]
        k_BGSK, v_BGSK = store.append(k_BTGK, v_BTGK)
        B, T, H, K = q_BTHK.shape
        if T > 1:
            return self._many(q_BTHK, k_BGSK, v_BGSK, store)
        # One query a row sees all keys but the padding. Those that share a key head are laid out
        # as if they were positions, so that each key is read once: twice as fast on a CPU as
        # `enable_gqa`.
        (G, S), end = k_BGSK.shape[1:3], store.columns
        mask = self._padding(end - S, end, q_BTHK) if self._most_pads > end - S else None
        return F.scaled_dot_product_attention(q_BTHK.reshape(B, G, H // G, K), k_BGSK, v_BGSK,
                                              attn_mask=mask).reshape(B, 1, H, K)

    def _many(self, q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, store: _Store) -> Tensor:
        """T queries a row, a block at a time: each block meets only keys it can see."""
        T, S, window = q_BTHK.shape[1], k_BGSK.shape[2], store.window
        q_BHTK = q_BTHK.transpose(1, 2)
        block = _BLOCK if window is None else _WINDOW_BLOCK
        outs = []
        for start in range(0, T, block):
            t = min(block, T - start)
            high = S - T + start + t
            low = 0 if window is None else max(0, high - t - window + 1)
            first = store.columns - S + low  # the column of the first key
            mask = self._corner(window, t, high - low, q_BTHK)
            if self._most_pads > first:
                mask = self._without_pads(mask, first)
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

    def _without_pads(self, mask_ts: Tensor, first: int) -> Tensor:
        """[B, 1, t, s] from [t, s]: padding unseen, except by itself, lest a softmax be empty."""
        key_s = torch.arange(first, first + mask_ts.shape[1], device=mask_ts.device)
        real_B11s = (key_s >= self._pads_B[:, None])[:, None, None]
        itself_ts = key_s == key_s[-mask_ts.shape[0]:, None]
        return torch.where(real_B11s | itself_ts, mask_ts, float("-inf"))

    def _padding(self, first: int, end: int, like: Tensor) -> Tensor:
        """Additive mask [B, 1, 1, S] of the columns from `first`, shared by layers of a step."""
        if self._pad_mask is None or self._pad_mask[:2] != (first, end):
            mask_1S = like.new_zeros(1, end - first)
            self._pad_mask = first, end, self._without_pads(mask_1S, first)
        return self._pad_mask[2]

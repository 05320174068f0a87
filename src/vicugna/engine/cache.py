"""The KV cache: the attention context of a network while it generates.

Rows of a batch are left-padded, so that their newest tokens share a column. Layers that attend to
everything cache every column; layers with a window or chunks drop what no later token attends to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.models.layers.mask import Span, additive

# Spare columns when a buffer grows. A step reads all columns anyway, so copying them once every
# 256 steps costs under one percent, without the memory that doubling would waste.
_SPARE = 256
# Queries of a block when one call has many: bounds the mask, skips keys that are masked anyway.
_BLOCK, _WINDOW_BLOCK = 256, 64


class _LayerCache:
    """One layer's keys, and values unless they are the keys: buffers [B, G, capacity, width], of
    which `filled` columns are in use."""

    def __init__(self, span: Span, parts: list[Tensor]) -> None:
        self.span, self.reach = span, span.window or span.chunk
        self.length = 0  # columns since the start, dropped ones included
        self.filled = 0
        self.buffers = [x.new_empty(x.shape[0], x.shape[2], 0, x.shape[3]) for x in parts]

    def append(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take T new columns; return keys and values of all columns that the new queries may
        attend to, as views [B, G, S, width]."""
        T = parts[0].shape[1]
        retained = self.filled if self.reach is None else min(self.filled, self.reach - 1)
        if self.filled + T > self.buffers[0].shape[2]:
            old = [x[:, :, self.filled - retained : self.filled] for x in self.buffers]
            self.buffers = [
                torch.cat([x, x.new_empty(*x.shape[:2], T + _SPARE, x.shape[3])], dim=2)
                for x in old]
            self.filled = retained
        start, stop = self.filled, self.filled + T
        for buffer, new in zip(self.buffers, parts, strict=True):
            buffer[:, :, start:stop] = new.transpose(1, 2)
        self.filled, self.length = stop, self.length + T
        views = [x[:, :, start - retained : stop] for x in self.buffers]
        return views[0], views[-1]


class Cache:
    """An `Attend` with a KV cache: call the network again and again with the tokens that follow.

    `pads[b]` columns at the start of row b are padding, to which its tokens never attend; give
    them position 0. Memory per row and token: 2 * G * K elements for each layer without a window;
    a windowed layer holds at most window + T + 256 columns, T being the longest recent call.
    Results are those of attention over the whole sequence, whatever the split into calls.
    """

    has_kv_cache = True

    def __init__(self, pads: list[int], device: torch.device | str = "cpu") -> None:
        self._pads_B = torch.tensor(pads, device=device)
        self._most_pads = max(pads)
        self._layers: dict[int, _LayerCache] = {}
        self._conv_states: dict[int, Tensor] = {}
        self._causal_masks: dict[int | None, Tensor] = {}
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

    def select(self, rows: list[int]) -> None:
        """Make the batch of these rows of it: drops finished ones, repeats shared prompts."""
        index = torch.tensor(rows, device=self._pads_B.device)
        self._pads_B = self._pads_B[index]
        self._most_pads = int(self._pads_B.max())
        self._step_masks = {}
        for layer in self._layers.values():
            layer.buffers = [x.index_select(0, index) for x in layer.buffers]
        self._conv_states = {layer: x_BnD[index] for layer, x_BnD in self._conv_states.items()}

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span) -> Tensor:
        """Append the new keys and values, attend over all that is visible: [B, T, H, width]."""
        parts = [k_BTGK] if v_BTGK is None else [k_BTGK, v_BTGK]
        if layer not in self._layers:
            self._layers[layer] = _LayerCache(span, parts)
        cached = self._layers[layer]
        k_BGSK, v_BGSK = cached.append(parts)
        B, T, H, K = q_BTHK.shape
        if T > 1:
            return self._many(q_BTHK, k_BGSK, v_BGSK, cached)
        # One query a row attends to all keys but the padding. Those that share a key head are laid
        # out as if they were positions, so that each key is read once: twice as fast on a CPU as
        # `enable_gqa`.
        G = k_BGSK.shape[1]
        return F.scaled_dot_product_attention(
            q_BTHK.reshape(B, G, H // G, K), k_BGSK, v_BGSK,
            attn_mask=self._step_mask(cached, k_BGSK)).reshape(B, 1, H, -1)

    def _many(self, q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, cached: _LayerCache) -> Tensor:
        """T queries a row, in blocks, each over the keys that any of its queries attends to."""
        T, S, reach = q_BTHK.shape[1], k_BGSK.shape[2], cached.reach
        q_BHTK = q_BTHK.transpose(1, 2)
        block = _BLOCK if reach is None or reach >= 4 * _BLOCK else _WINDOW_BLOCK
        outs = []
        for start in range(0, T, block):
            t = min(block, T - start)
            high = S - T + start + t
            low = 0 if reach is None else max(0, high - t - reach + 1)
            keys = range(cached.length - S + low, cached.length - S + high)  # columns
            if self._most_pads > keys.start or cached.span.chunk:
                mask = self._row_masks(t, keys, cached.span, q_BTHK)
            else:
                mask = self._causal_mask(t, len(keys), cached.span, q_BTHK)
            outs.append(F.scaled_dot_product_attention(
                q_BHTK[:, :, start : start + t], k_BGSK[:, :, low:high], v_BGSK[:, :, low:high],
                attn_mask=mask, enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1]))
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _causal_mask(self, t: int, s: int, span: Span, like: Tensor) -> Tensor:
        """Additive mask [t, s] of the last t queries against the last s keys, without padding or
        chunks: counted from the end it is always the same, so a slice of one cached causal mask."""
        whole = self._causal_masks.get(span.window)
        if whole is None or whole.shape[0] < t or whole.shape[1] < s:
            key = torch.arange(s + 16 * _SPARE, device=like.device)
            whole = additive(span.mask(key[-t:], key, key.new_zeros(t)), like.dtype)
            self._causal_masks[span.window] = whole
        # PyTorch's CUDA kernels take a mask that begins anywhere, and then fault on reading it.
        return whole[-t:, -s:] if like.device.type == "cpu" else whole[-t:, -s:].contiguous()

    def _row_masks(self, t: int, keys: range, span: Span, like: Tensor) -> Tensor:
        """Additive masks [B, 1, t, s] of the last t of the columns `keys`, each row with its own
        padding. Padding attends to itself: no softmax is over nothing."""
        key = torch.arange(keys.start, keys.stop, device=like.device)
        query = key[-t:]
        mask = span.mask(query, key, self._pads_B[:, None])
        return additive((mask | (key == query[:, None]))[:, None], like.dtype)

    def _step_mask(self, cached: _LayerCache, k_BGSK: Tensor) -> Tensor | None:
        """Additive mask [B, 1, 1, S] of one new query a row, shared by layers of a step."""
        S, end, chunk = k_BGSK.shape[2], cached.length, cached.span.chunk
        if self._most_pads <= end - S and (chunk is None or end <= chunk):
            return None
        key = S, end, chunk
        if key not in self._step_masks:
            self._step_masks = {k: mask for k, mask in self._step_masks.items() if k[1] == end}
            self._step_masks[key] = self._row_masks(1, range(end - S, end), cached.span, k_BGSK)
        return self._step_masks[key]

"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form of Llama's
Hugging Face weights: feature i is paired with feature i + K/2."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vicugna.errors import VicugnaError


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Radians per position of each feature pair, float32 [K/2].

    `scaling` is config.json's `rope_scaling`: None, `linear`, or `llama3` (Llama 3.1's rule: long
    wavelengths are stretched by `factor`, short ones kept, those between interpolated).
    Raises VicugnaError for a kind it does not know or a missing key.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = scaling or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")  # old files: type
    if kind == "default":
        return inverse
    try:
        factor = float(scaling["factor"])
        if kind == "linear":
            return inverse / factor
        if kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            original = float(scaling["original_max_position_embeddings"])
            wavelength = 2 * math.pi / inverse
            share = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - share) * inverse / factor + share * inverse
    except KeyError as error:
        raise VicugnaError(f"rope_scaling of type {kind!r} lacks {error}", "config.json",
                           "Restore the key from the original checkpoint") from None
    raise VicugnaError(f"unknown rope_scaling type {kind!r}", "config.json",
                       "Known types: default, linear, llama3")


def rotation(positions_BT: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair, [B, T, 1, K/2]; angles are made in float32."""
    angle = positions_BT[:, :, None, None].float() * inverse.to(positions_BT.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its angle."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

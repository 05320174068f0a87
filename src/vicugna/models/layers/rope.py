"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form of Llama's
Hugging Face weights: feature i is paired with feature i + K/2."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vicugna.errors import config_error

ORIGINAL = "original_max_position_embeddings"


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Radians per position of each feature pair, float32 [K/2].

    `scaling` is config.json's `rope_scaling`: None, `linear`, `llama3` (Llama 3.1's rule: long
    wavelengths are stretched by `factor`, short ones are not, those between are interpolated) or
    `yarn`, which needs `attention_factor` too.
    Raises VicugnaError for a kind it does not know or a missing key.
    """
    power = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inverse = 1.0 / power
    scaling = scaling or {}
    if (kind := kind_of(scaling)) == "default":
        return inverse
    if kind not in ("linear", "llama3", "yarn"):
        raise config_error(f"unknown rope_scaling type {kind!r}",
                           "Known types: default, linear, llama3, yarn")
    try:
        factor = float(scaling["factor"])
        if not 0 < factor < math.inf:
            raise ValueError(f"factor is {factor}")
        scaled_context(scaling)  # an impossible original context raises here
        if kind == "linear":
            return inverse / factor
        if kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            original = float(scaling[ORIGINAL])
            wavelength = 2 * math.pi / inverse
            share = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - share) * inverse / factor + share * inverse
        attention_factor(scaling)  # impossible values of its keys raise here
        # Summed as transformers does: at position 40,000 a last bit is 0.002 radians.
        ramp = _yarn_ramp(head_dim, theta, scaling)
        return 1.0 / (factor * power) * (1 - ramp) + inverse * ramp
    except KeyError as error:
        raise config_error(f"rope_scaling of type {kind!r} lacks {error}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise config_error(f"rope_scaling of type {kind!r} is impossible: {error}") from None


def scaled_context(scaling: Mapping[str, Any] | None) -> int:
    """`factor` times the original context, for YaRN, and for linear scaling that states one; else
    0. Of Llama 3's kind the factor says nothing about the context: Llama 3.2's is 131,072, with a
    factor of 32 and an original of 8,192."""
    if not scaling or kind_of(scaling) not in ("linear", "yarn") or scaling.get(ORIGINAL) is None:
        return 0
    return round(float(scaling["factor"]) * float(scaling[ORIGINAL]))


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies cosine and sine by, the square root of the attention temperature; 1 for
    every other kind. `scaling` is one that `inverse_frequencies` accepts."""
    if not scaling or kind_of(scaling) != "yarn":
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    factor = float(scaling["factor"])
    if (one := scaling.get("mscale")) and (all_dims := scaling.get("mscale_all_dim")):
        return mscale(factor, one) / mscale(factor, all_dims)
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention scaling for a context `factor` times longer (arXiv 2309.00071, 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation(positions_BT: Tensor, inverse: Tensor, dtype: torch.dtype, factor: float = 1.0
             ) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair times `factor` (`attention_factor`),
    [B, T, 1, K/2]; angles are float32."""
    angle = positions_BT[:, :, None, None].float() * inverse
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+K/2}) by its angle."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_pairs(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_{2i}, x_{2i+1}) by its angle, the interleaved form of Meta's weights."""
    a, b = x_BTHK[..., 0::2], x_BTHK[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def kind_of(scaling: Mapping[str, Any]) -> str:
    """The kind of scaling; files of earlier releases call the key `type`."""
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _yarn_ramp(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """The share of each pair's original frequency in YaRN's, 0 to 1 [K/2]: 1 for pairs that rotate
    more than `beta_fast` times within the original context, 0 below `beta_slow` times."""
    original = scaling[ORIGINAL]
    low, high = (head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
                 for rotations in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # no division by zero
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

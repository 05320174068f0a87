"""Llama 4's vision encoder: features of image tiles, which take the place of image tokens.

A bidirectional transformer over patches with learned and 2-D rotary positions; then a pixel
shuffle joins neighbouring patches, so that fewer and wider features reach the text model.
Parameter names are those of Hugging Face's Llama4VisionModel. Letters: N tiles, P patches,
C width of the encoder.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicugna.errors import VicugnaError, config_error
from vicugna.models.layers import rope
from vicugna.models.layers.config import rope_keys, typed

# Keys that transformers' model ignores: only the values that it computes with are accepted.
FIXED = {"hidden_act": "gelu", "norm_eps": 1e-5, "multi_modal_projector_bias": False,
         "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}


@dataclass(frozen=True)
class VisionConfig:
    """The keys of `vision_config` in config.json, with Hugging Face's defaults."""

    hidden_size: int = 768
    intermediate_size: int = 5632
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 7680
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the mapping `vision_config`; keys that the dataclass does not have are ignored.

        Raises VicugnaError for wrong types, impossible shapes, and values that are not supported.
        """
        for key, only in FIXED.items():
            if config.get(key, only) != only:
                raise _wrong(f"{key} {config[key]!r} is not supported", f"Only {only!r} is")
        rope_values = rope_keys(config)
        if rope_values["rope_scaling"]:
            raise _wrong("RoPE is scaled, which is not supported", "Only the default type is")
        values = {**config, **rope_values}
        return cls(**{field.name: typed(field.name, values[field.name], field.type)
                      for field in fields(cls) if values.get(field.name) is not None})

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise _wrong(f"{field.name} is {getattr(self, field.name)}", "It must be positive")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % (4 * heads):
            raise _wrong(f"hidden_size {width} and num_attention_heads {heads} do not make heads "
                         "of a width divisible by 4", "2-D rotary embedding needs that")
        ratio, side = self.pixel_shuffle_ratio, self.side
        if (not side or not 0 < ratio <= 1 or abs(1 / ratio - self.shuffle) > 1e-6
                or side % self.shuffle):
            raise _wrong(f"pixel_shuffle_ratio {ratio} does not fit a side of {side} patches",
                         "It must be 1/n, n dividing image_size // patch_size")
        for name, needed in (("intermediate_size", width * self.shuffle**2),
                             ("projector_input_dim", self.projector_output_dim),
                             ("vision_output_dim", self.projector_output_dim)):
            if getattr(self, name) != needed:
                raise _wrong(f"{name} is {getattr(self, name)}, but the adapter needs {needed}",
                             "Restore the key from the original checkpoint")

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches along one side that become one feature."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def features(self) -> int:
        """Features of one tile, one for each of its image tokens."""
        return (self.side // self.shuffle) ** 2

    def check_tiles(self, images: Tensor) -> None:
        """Raise VicugnaError unless these are pixel values [N, 3, H, W] of tiles."""
        shape = self.num_channels, self.image_size, self.image_size
        if images.shape[1:] != shape:
            raise VicugnaError(f"images of shape {list(images.shape)}", "images", "Give tiles of "
                               f"{' x '.join(map(str, shape))} pixels")

    def to_dict(self) -> dict[str, Any]:
        """The content of `vision_config`."""
        return {"model_type": "llama4_vision_model", **FIXED, **asdict(self)}


def _wrong(what: str, fix: str) -> VicugnaError:
    return config_error(f"vision_config: {what}", fix)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # training may use them after generation
def rotation(config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P + 1, 1, K/2] of 2-D RoPE: the first half of a head's pairs rotates by the
    patch's column, the second by its row, both from 1; the class token, last, does not rotate."""
    per_head = config.hidden_size // config.num_attention_heads
    inverse = rope.inverse_frequencies(per_head // 2, config.rope_theta, None)
    n_P1 = torch.arange(config.side**2, device=inverse.device)[:, None]
    angle = torch.cat([(n_P1 % config.side + 1) * inverse, (n_P1 // config.side + 1) * inverse], -1)
    angle = F.pad(angle, (0, 0, 0, 1))[:, None].to(device)
    return angle.cos(), angle.sin()


def pixel_shuffle(x_NPC: Tensor, n: int) -> Tensor:
    """Join each square of n * n patches into one, row by row: [N, P / n^2, n^2 * C]."""
    N, P, C = x_NPC.shape
    side = round(P**0.5) // n
    squares = x_NPC.reshape(N, side, n, side, n, C).transpose(2, 3)
    return squares.reshape(N, side * side, n * n * C)


class Attention(nn.Module):
    """Bidirectional attention among the patches of a tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.H, self.K = config.num_attention_heads, C // config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(C, C), nn.Linear(C, C)
        self.v_proj, self.o_proj = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x_NPC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        N, P, _ = x_NPC.shape
        q, k, v = (project(x_NPC).view(N, P, self.H, self.K)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rope.rotate_pairs(x.float(), *rotation).to(v.dtype) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(N, P, self.H * self.K))


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, inner: int, out: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner, bias=bias)
        self.fc2 = nn.Linear(inner, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.input_layernorm = nn.LayerNorm(C)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(C)
        self.mlp = MLP(C, config.intermediate_size, C, bias=True)

    def forward(self, x_NPC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_NPC = x_NPC + self.self_attn(self.input_layernorm(x_NPC), rotation)
        return x_NPC + self.mlp(self.post_attention_layernorm(x_NPC))


class VisionModel(nn.Module):
    """Pixels of tiles [N, 3, H, W] -> features [N, `config.features`, `projector_output_dim`]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        C, out = config.hidden_size, config.projector_output_dim
        pixels = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.ModuleDict({"linear": nn.Linear(pixels, C, bias=False)})
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.side**2 + 1, C))
        self.layernorm_pre = nn.LayerNorm(C)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers))})
        self.layernorm_post = nn.LayerNorm(C)
        adapter = MLP(C * config.shuffle**2, config.projector_input_dim, out, bias=False)
        self.vision_adapter = nn.ModuleDict({"mlp": adapter})

    def forward(self, images: Tensor) -> Tensor:
        c, embed = self.config, self.patch_embedding["linear"]
        c.check_tiles(images)
        patches = F.unfold(images.to(self.class_embedding), c.patch_size, stride=c.patch_size)
        x_NPC = embed(patches.transpose(1, 2))
        x_NPC = torch.cat([x_NPC, self.class_embedding.expand(len(x_NPC), 1, -1)], dim=1)
        x_NPC = self.layernorm_pre(x_NPC + self.positional_embedding_vlm)
        layers: Any = self.model["layers"]
        for layer in layers:
            x_NPC = layer(x_NPC, rotation(c, x_NPC.device))
        x_NPC = pixel_shuffle(self.layernorm_post(x_NPC)[:, :-1], c.shuffle)  # no class token
        return F.gelu(self.vision_adapter["mlp"](x_NPC))

"""How a checkpoint's images are prepared, from the processor files beside its tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tokenizer import Tokenizer
from vicugna.tokenizer.settings import PROCESSORS

# The one value that is implemented for each of these keys.
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
         "resample": 2}  # bilinear


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes tiles of `size` * `size` pixels (see images.py), of which each is
    `features` tokens of text. The defaults are those of transformers' Llama4Processor."""

    size: int = 336
    features: int = 144
    max_patches: int = 16  # tiles of an image, not counting the one of the whole
    resize_to_max_canvas: bool = False
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, processors: Mapping[str, Mapping[str, Any]]) -> Self | None:
        """The settings in the files PROCESSORS by name, of which either may hold those of images;
        None where they are not of a Llama 4. VicugnaError for what is impossible or not built."""
        older, outer = (processors.get(name, {}) for name in PROCESSORS)
        own = outer.get("image_processor", older)
        where = PROCESSORS[1 if "image_processor" in outer else 0]
        if not isinstance(own, Mapping):
            raise _wrong("image_processor", own, "a mapping", where)
        kinds = own.get("image_processor_type"), outer.get("processor_class")
        if not any(str(kind).startswith("Llama4") for kind in kinds):
            return None
        given = {key: value for key, value in own.items() if value is not None}
        for key, only in FIXED.items():
            if given.get(key, only) != only:
                raise _wrong(key, given[key], f"{only!r}, as nothing else is built", where)
        sides = given.get("size", cls.size)
        sides = sides if isinstance(sides, Mapping) else {"height": sides, "width": sides}
        size: Any = sides.get("height")
        if not _whole(size, 4096) or sides.get("width") != size:
            raise _wrong("size", given["size"], "one height and width, up to 4,096", where)
        if not _whole(tiles := given.get("max_patches", cls.max_patches), 1024):
            raise _wrong("max_patches", tiles, "a number from 1 to 1,024", where)
        if not isinstance(largest := given.get("resize_to_max_canvas", False), bool):
            raise _wrong("resize_to_max_canvas", largest, "true or false", where)
        scale = given.get("rescale_factor", cls.rescale_factor)
        mean, std = (tuple(value) if isinstance(value, list | tuple) else (value,) * 3 for value in
                     (given.get(key, getattr(cls, key)) for key in ("image_mean", "image_std")))
        if (not all(map(_number, (scale, *mean, *std))) or 0 in std
                or (len(mean), len(std)) != (3, 3)):
            raise _wrong("rescale_factor, image_mean, image_std", [scale, mean, std],
                         "numbers, one for each colour, std other than 0", where)
        patch, ratio = outer.get("patch_size", 14), outer.get("pixel_shuffle_ratio", 0.5)
        if not _whole(patch, size) or not _number(ratio) or not 1 / 64 <= ratio <= 1:
            raise _wrong("patch_size, pixel_shuffle_ratio", [patch, ratio],
                         "a part of the size, and a number up to 1", PROCESSORS[1])
        features = (size // patch) ** 2 // round(1 / ratio**2)
        return cls(size, features, tiles, largest, float(scale), *map(_floats, (mean, std)))


def _floats(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # nor NaN


def _wrong(key: str, value: Any, due: str, where: str) -> VicugnaError:
    return VicugnaError(f"{key} is {str(value)[:60]}", where, f"It must be {due}")


def digest_with_images(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of a tokenizer with the image settings beside it, if there are any."""
    settings = ImageSettings.read(tokenizer.processors)
    return tokenizer.digest if settings is None else digest_of(
        {**tokenizer.contents, "images": asdict(settings)})

"""How a checkpoint's images are prepared, from the processor files beside its tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tokenizer import Tokenizer
from vicugna.tokenizer.settings import PROCESSORS

# The one value that is implemented for each of these keys.
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
         "resample": 2}  # bilinear
Number = Annotated[float, Field(strict=True, gt=-1e6, lt=1e6)]


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes tiles of `size` * `size` pixels (see images.py), of which each is
    `features` tokens of text. The defaults are those of transformers' Llama4Processor."""

    size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 336
    features: int = 144
    max_patches: Annotated[int, Field(strict=True, ge=1, le=1024)] = 16  # tiles, beside the whole
    resize_to_max_canvas: Annotated[bool, Field(strict=True)] = False
    rescale_factor: Number = 1 / 255
    image_mean: tuple[Number, Number, Number] = (0.5, 0.5, 0.5)
    image_std: tuple[Number, Number, Number] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, processors: Mapping[str, Mapping[str, Any]]) -> Self | None:
        """The settings in the files PROCESSORS by name, of which either may hold those of images;
        None where they are not of a Llama 4. VicugnaError for what is impossible or not built."""
        older, outer = (processors.get(name, {}) for name in PROCESSORS)
        own = outer.get("image_processor", older)
        where = PROCESSORS[1 if "image_processor" in outer else 0]
        if not isinstance(own, Mapping):
            raise _wrong("image_processor", own, "it must be a mapping", where)
        kinds = own.get("image_processor_type"), outer.get("processor_class")
        if not any(str(kind).startswith("Llama4") for kind in kinds):
            return None
        given = {key: value for key, value in own.items() if value is not None}
        for key, only in FIXED.items():
            if given.get(key, only) != only:
                raise _wrong(key, given[key], f"only {only!r} is implemented", where)
        size = given.get("size")
        if isinstance(size, Mapping) and size.get("height") == size.get("width"):
            given["size"] = size.get("height")
        for key in ("image_mean", "image_std"):
            if isinstance(given.get(key), int | float):
                given[key] = [given[key]] * 3
        try:
            found = cls(**{key: given[key] for key in asdict(cls()) if key in given})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            raise _wrong(key, given[key], first["msg"].lower(), where) from error
        if 0 in found.image_std:
            raise _wrong("image_std", found.image_std, "it must not be 0", where)
        patch, ratio = outer.get("patch_size", 14), outer.get("pixel_shuffle_ratio", 0.5)
        if (type(patch) is not int or type(ratio) not in (int, float)
                or not (1 <= patch <= found.size and 1 / 64 <= ratio <= 1)):
            raise _wrong("patch_size, pixel_shuffle_ratio", [patch, ratio],
                         "they must be a part of the size, and a number up to 1", PROCESSORS[1])
        return replace(found, features=(found.size // patch) ** 2 // round(1 / ratio**2))


def _wrong(key: str, value: Any, why: str, where: str) -> VicugnaError:
    return VicugnaError(f"{key} is {str(value)[:60]}: {why}", where, "Correct it")


def digest_with_images(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of a tokenizer with the image settings beside it, if there are any."""
    settings = ImageSettings.read(tokenizer.processors)
    return tokenizer.digest if settings is None else digest_of(
        {**tokenizer.contents, "images": asdict(settings)})

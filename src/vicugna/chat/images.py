"""From images in a chat to tiles of pixels, and to the tokens that stand for them.

The same pixels and tokens as transformers' Llama4Processor makes (image_processing_llama4.py,
processing_llama4.py). An image is laid on the canvas of up to `max_patches` tiles that shows it
best, and cut; where that makes several tiles, one of the whole image follows.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vicugna.chat.image_settings import ImageSettings
from vicugna.chat.messages import Message, image_parts
from vicugna.chat.template import encode
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer
from vicugna.tokenizer.settings import PROCESSORS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
MAX_PIXELS = 50_000_000  # of an image: a small file may claim any number
IMAGE, PATCH = "<|image|>", "<|patch|>"
MARKS = ("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
Grid = tuple[int, int]  # rows and columns of tiles


def encode_with_images(tokenizer: Tokenizer, messages: list[Message], tile_size: int,
                       tile_tokens: int, image_token_id: int) -> tuple[list[int], Tensor]:
    """Tokens of a chat to answer with images in it, and their tiles (see `tiles`).

    A part {"type": "image"} has an image as "image" (one of Pillow's, or as the following), "path"
    (a file's) or "url" (only data:, as nothing is fetched). The network takes tiles of `tile_size`
    pixels a side as `tile_tokens` tokens `image_token_id` each. Raises VicugnaError for anything
    else, and images that this model or its chat template cannot take.
    """
    parts = image_parts(messages)
    settings = _settings(tokenizer, tile_size, tile_tokens, image_token_id)
    made = [tiles(_opened(part, f"messages[{m}].content[{p}]"), settings)
            for (m, p), part in parts.items()]
    # Without the images themselves, which a template could only write out.
    bare = list(map(dict, messages))
    for m in {m for m, _ in parts}:
        bare[m]["content"] = [{"type": "image"} if (m, p) in parts else part
                              for p, part in enumerate(bare[m]["content"])]
    tokens = expand(encode(tokenizer, bare), [grid for _, grid in made], tokenizer, tile_tokens)
    return tokens, torch.cat([pixels for pixels, _ in made])


def _settings(tokenizer: Tokenizer, tile_size: int, tile_tokens: int, image_token_id: int
              ) -> ImageSettings:
    """The checkpoint's image settings, by default what its network needs."""
    settings = ImageSettings.read(tokenizer.processors)
    if settings is None and tokenizer.processors:
        raise VicugnaError("the checkpoint's images are prepared in an unknown way",
                           min(tokenizer.processors), "Use the files of a Llama 4")
    settings = settings or ImageSettings(tile_size, tile_tokens)
    if (settings.size, settings.features) != (tile_size, tile_tokens):
        raise VicugnaError(
            f"tiles of {settings.size} pixels a side and {settings.features} tokens, but the "
            f"network takes {tile_size} and {tile_tokens}", ", ".join(PROCESSORS),
            "Restore the files from the original checkpoint")
    if missing := [name for name in (IMAGE, PATCH, *MARKS) if tokenizer.id_of(name) is None]:
        raise VicugnaError(f"the tokenizer has no {missing[0]}", "tokenizer.json",
                           "Use the tokenizer of the checkpoint")
    if tokenizer.id_of(PATCH) != image_token_id:
        raise VicugnaError(f"image_token_index is {image_token_id}, but {PATCH} is token "
                           f"{tokenizer.id_of(PATCH)}", "config.json", "Use the model's tokenizer")
    return settings


def _opened(part: Message, where: str) -> Image.Image:
    """The image of a part, in RGB, on white where it is transparent. A file's image is turned
    by its EXIF orientation; an Image object is taken as it is."""
    given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    if part["type"] != "image" or len(given) != 1:
        raise VicugnaError(f"not one image in a part of type {str(part['type'])[:40]!r}", where,
                           'Write {"type": "image", "image" or "path" or "url": ...}')
    try:
        if isinstance(given[0], Image.Image):
            return _in_colour(_checked(given[0], where))
        with Image.open(_file(given[0], part, where), formats=FORMATS) as image:
            _checked(image, where)
            # Phones put a small copy into a JPEG, which is then of the format "MPO".
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise VicugnaError("the image is animated", where, "Give one of its frames")
            return _in_colour(ImageOps.exif_transpose(image))
    except VicugnaError:
        raise
    except Exception as error:  # Pillow raises many kinds over broken files
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:100]})"
        raise VicugnaError(f"the image cannot be read{why}", where,
                           f"Give a whole one in {', '.join(FORMATS)}") from error


def _file(source: Any, part: Message, where: str) -> Path | BytesIO:
    """What to open: the content of a data: URL, or a path that is not of a "url"."""
    if isinstance(source, str) and source.startswith("data:"):
        head, comma, content = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise VicugnaError("a data: URL that is not in base64", where,
                               "Write data:image/png;base64,...")
        try:
            return BytesIO(base64.b64decode(content, validate=True))
        except (binascii.Error, ValueError) as error:
            raise VicugnaError(f"not base64: {error}", where, "Encode the file again") from error
    if part.get("url") is not None or str(source).startswith(("http://", "https://")):
        raise VicugnaError("only data: URLs are read, since nothing is fetched from the network",
                           where, "Get the image yourself, and give it or its path")
    if not isinstance(source, str | Path):
        raise VicugnaError(f"an image cannot be of type {type(source).__name__}", where,
                           "Give one of Pillow's, a path or a data: URL")
    if not Path(source).is_file():
        raise VicugnaError("no such file", str(source)[:200], "Check the path")
    return Path(source)


def _checked(image: Image.Image, where: str) -> Image.Image:
    """The image, of which only the size and mode have been read."""
    if not 1 <= image.width * image.height <= MAX_PIXELS:
        raise VicugnaError(f"an image of {image.width} * {image.height} pixels", where,
                           f"Give one of up to {MAX_PIXELS:,}")
    if image.mode[0] in "IF":  # which Pillow would not scale but clip: white
        raise VicugnaError(f"an image of mode {image.mode}, more than 8 bits deep", where,
                           "Convert it to 8 bits for each colour")
    return image


def _in_colour(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def tiles(image: Image.Image, settings: ImageSettings) -> tuple[Tensor, Grid]:
    """An image in RGB -> its tiles, bfloat16 [N, 3, size, size], row by row and, where there are
    several, all of it as the last; and the grid of those before it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    (rows, columns), (height, width) = _fit(image.height, image.width, settings)
    side = settings.size
    canvas = F.pad(_resized(pixels, height, width),
                   (0, columns * side - width, 0, rows * side - height))
    cut = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(cut) > 1:
        cut = torch.cat([cut, _resized(pixels, side, side)[None]])
    mean, std = (torch.tensor(values, dtype=torch.bfloat16)[:, None, None]
                 for values in (settings.image_mean, settings.image_std))
    return (cut.bfloat16() * settings.rescale_factor - mean) / std, (rows, columns)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """In whole numbers, as torchvision does on current processors."""
    return F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]


def _fit(height: int, width: int, settings: ImageSettings) -> tuple[Grid, tuple[int, int]]:
    """The grid of tiles for an image of this size, and the size it has on them.

    That is the grid on which it need not shrink (or as little as possible) and, then, grows as
    little as possible (as much, with resize_to_max_canvas); of those, the one of the fewest tiles.
    Computed with tensors, whose float32 decides where the reference rounds down.
    """
    most = settings.max_patches
    grids_N2 = torch.tensor([(rows, columns) for rows in range(1, most + 1)
                             for columns in range(1, most // rows + 1)])
    scales_N = (grids_N2 * settings.size / torch.tensor([height, width])).amin(1)
    enough = scales_N[scales_N >= 1]
    if not len(enough):
        best = scales_N.max()
    else:
        best = enough.max() if settings.resize_to_max_canvas else enough.min()
    fitting = grids_N2[scales_N == best]
    grid = fitting[fitting.prod(1).argmin()]
    limits: list[Any] = list(grid * settings.size)
    if not settings.resize_to_max_canvas:  # a small image grows no further than to one tile's side
        limits = [min(max(n, settings.size), limit)
                  for n, limit in zip((height, width), limits, strict=True)]
    by_height, by_width = limits[0] / height, limits[1] / width
    if by_width < by_height:
        size = min(math.floor(height * by_width), int(limits[0])), int(limits[1])
    else:
        size = int(limits[0]), min(math.floor(width * by_height), int(limits[1]))
    return (int(grid[0]), int(grid[1])), (max(size[0], 1), max(size[1], 1))


def expand(tokens: Sequence[int], grids: Sequence[Grid], tokenizer: Tokenizer, features: int
           ) -> list[int]:
    """Tokens of a chat with each image's mark spelled out: its tiles, `features` tokens each, and
    what stands between them. VicugnaError unless there are as many marks as images."""
    image, patch, start, end, beside, below = map(tokenizer.id_of, (IMAGE, PATCH, *MARKS))
    if (marks := tokens.count(image)) != len(grids):
        raise VicugnaError(f"{len(grids)} images, but the chat template shows {marks}",
                           "messages", "Put images where the template takes them, such as into "
                           "messages of the user")
    tile, expanded, left = [patch] * features, list[Any](), iter(grids)
    for token in tokens:
        if token != image:
            expanded.append(token)
            continue
        rows, columns = next(left)
        expanded.append(start)
        if rows * columns > 1:
            row = [*tile, *[beside, *tile] * (columns - 1), below]
            expanded += row * rows
        expanded += [image, *tile, end]
    return expanded

"""From pictures in a chat to tiles of pixels, and to the tokens that stand for them.

The same pixels and tokens as transformers' Llama4Processor makes (image_processing_llama4.py,
processing_llama4.py). A picture is laid on the canvas of up to `max_patches` tiles that shows it
best, and cut; where that makes several tiles, one of the whole picture follows.
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

from vicugna.chat.template import Message, check_messages, image_parts
from vicugna.errors import VicugnaError
from vicugna.tokenizer.bpe import Tokenizer
from vicugna.tokenizer.settings import PROCESSORS, ImageSettings

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
MAX_PIXELS = 50_000_000  # of a picture: a small file may claim any number
IMAGE, PATCH = "<|image|>", "<|patch|>"
MARKS = ("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
Grid = tuple[int, int]  # rows and columns of tiles


def read(tokenizer: Tokenizer, messages: list[Message], config: Any) -> tuple[list[int],
                                                                            Tensor | None]:
    """Tokens of a chat to answer, and the tiles of its pictures (see `tiles`), None without any.

    A part {"type": "image"} has a picture as "image" (one of Pillow's, or as the following), "path"
    (a file's) or "url" (only data:, as nothing is fetched). `config` is the network's. Raises
    VicugnaError for anything else, and pictures that this model or its chat template cannot take.
    """
    check_messages(messages)
    if not (parts := image_parts(messages)):
        return tokenizer.chat(messages), None
    how = _settings(tokenizer, config)
    made = [tiles(_opened(part, f"messages[{m}].content[{p}]"), how)
            for (m, p), part in parts.items()]
    # Without the pictures themselves, which a template could only write out.
    bare = list(map(dict, messages))
    for m in {m for m, _ in parts}:
        bare[m]["content"] = [{"type": "image"} if (m, p) in parts else part
                              for p, part in enumerate(bare[m]["content"])]
    tokens = expand(tokenizer.chat(bare), [grid for _, grid in made], tokenizer, how.features)
    return tokens, torch.cat([pixels for pixels, _ in made])


def _settings(tokenizer: Tokenizer, config: Any) -> ImageSettings:
    """What the checkpoint says of pictures, or if it says nothing, what its network needs."""
    eyes, how = getattr(config, "vision_config", None), tokenizer.images
    if eyes is None:
        raise VicugnaError("this model has no vision encoder: it takes text only", "messages",
                           "Leave the pictures out, or use a model that sees")
    if how is None and tokenizer.processors:
        raise VicugnaError("the checkpoint's pictures are prepared in an unknown way",
                           min(tokenizer.processors), "Use the files of a Llama 4")
    how = how or ImageSettings(eyes.image_size, eyes.features)
    if (how.size, how.features) != (eyes.image_size, eyes.features):
        raise VicugnaError(
            f"tiles of {how.size} pixels a side and {how.features} tokens, but the network takes "
            f"{eyes.image_size} and {eyes.features}", ", ".join(PROCESSORS),
            "Restore the files from the original checkpoint")
    if missing := [name for name in (IMAGE, PATCH, *MARKS) if tokenizer.id_of(name) is None]:
        raise VicugnaError(f"the tokenizer has no {missing[0]}", "tokenizer.json",
                           "Use the tokenizer of the checkpoint")
    if tokenizer.id_of(PATCH) != config.image_token_index:
        raise VicugnaError(f"image_token_index is {config.image_token_index}, but {PATCH} is token "
                           f"{tokenizer.id_of(PATCH)}", "config.json", "Use the model's tokenizer")
    return how


def _opened(part: Message, where: str) -> Image.Image:
    """The picture of a part, in RGB, on white where it is transparent. A file's picture is turned
    as its EXIF says; one of Pillow's is taken as it is."""
    given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    if part["type"] != "image" or len(given) != 1:
        raise VicugnaError(f"not one picture in a part of type {str(part['type'])[:40]!r}", where,
                           'Write {"type": "image", "image" or "path" or "url": ...}')
    try:
        if isinstance(given[0], Image.Image):
            return _in_colour(_checked(given[0], where))
        with Image.open(_file(given[0], part, where), formats=FORMATS) as picture:
            _checked(picture, where)
            # Phones put a small copy into a JPEG, which is then of the format "MPO".
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                raise VicugnaError("the picture is animated", where, "Give one of its frames")
            return _in_colour(ImageOps.exif_transpose(picture))
    except VicugnaError:
        raise
    except Exception as error:  # Pillow raises many kinds over broken files
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:100]})"
        raise VicugnaError(f"the picture cannot be read{why}", where,
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
                           where, "Get the picture yourself, and give it or its path")
    if not isinstance(source, str | Path):
        raise VicugnaError(f"a picture cannot be of type {type(source).__name__}", where,
                           "Give one of Pillow's, a path or a data: URL")
    if not Path(source).is_file():
        raise VicugnaError("no such file", str(source)[:200], "Check the path")
    return Path(source)


def _checked(picture: Image.Image, where: str) -> Image.Image:
    """The picture, of which only the size and mode have been read."""
    if not 1 <= picture.width * picture.height <= MAX_PIXELS:
        raise VicugnaError(f"a picture of {picture.width} * {picture.height} pixels", where,
                           f"Give one of up to {MAX_PIXELS:,}")
    if picture.mode[0] in "IF":  # which Pillow would not scale but clip: white
        raise VicugnaError(f"a picture of mode {picture.mode}, more than 8 bits deep", where,
                           "Convert it to 8 bits for each colour")
    return picture


def _in_colour(picture: Image.Image) -> Image.Image:
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def tiles(picture: Image.Image, how: ImageSettings) -> tuple[Tensor, Grid]:
    """A picture in RGB -> its tiles, bfloat16 [N, 3, how.size, how.size], row by row and, where
    there are several, all of it as the last; and the grid of those before it."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    (rows, columns), (height, width), side = *_fit(picture.height, picture.width, how), how.size
    canvas = F.pad(_resized(pixels, height, width),
                   (0, columns * side - width, 0, rows * side - height))
    cut = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(cut) > 1:
        cut = torch.cat([cut, _resized(pixels, side, side)[None]])
    mean, std = (torch.tensor(values, dtype=torch.bfloat16)[:, None, None]
                 for values in (how.image_mean, how.image_std))
    return (cut.bfloat16() * how.rescale_factor - mean) / std, (rows, columns)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """In whole numbers, as torchvision does on current processors."""
    return F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]


def _fit(height: int, width: int, how: ImageSettings) -> tuple[Grid, tuple[int, int]]:
    """The grid of tiles for a picture of this size, and the size it has on them.

    That is the grid on which it need not shrink (or as little as possible) and, then, grows as
    little as possible (as much, with resize_to_max_canvas); of those, the one of the fewest tiles.
    Computed with tensors, whose float32 decides where the reference rounds down.
    """
    most = how.max_patches
    grids_N2 = torch.tensor([(rows, columns) for rows in range(1, most + 1)
                             for columns in range(1, most // rows + 1)])
    scales_N = (grids_N2 * how.size / torch.tensor([height, width])).amin(1)
    enough = scales_N[scales_N >= 1]
    if not len(enough):
        best = scales_N.max()
    else:
        best = enough.max() if how.resize_to_max_canvas else enough.min()
    fitting = grids_N2[scales_N == best]
    grid = fitting[fitting.prod(1).argmin()]
    limits: list[Any] = list(grid * how.size)
    if not how.resize_to_max_canvas:  # a small picture grows no further than to one tile's side
        limits = [min(max(n, how.size), limit)
                  for n, limit in zip((height, width), limits, strict=True)]
    by_height, by_width = limits[0] / height, limits[1] / width
    if by_width < by_height:
        size = min(math.floor(height * by_width), int(limits[0])), int(limits[1])
    else:
        size = int(limits[0]), min(math.floor(width * by_height), int(limits[1]))
    return (int(grid[0]), int(grid[1])), (max(size[0], 1), max(size[1], 1))


def expand(tokens: Sequence[int], grids: Sequence[Grid], tokenizer: Tokenizer, features: int
           ) -> list[int]:
    """Tokens of a chat with each picture's mark spelled out: its tiles, `features` tokens each, and
    what stands between them. VicugnaError unless there are as many marks as pictures."""
    image, patch, start, end, beside, below = map(tokenizer.id_of, (IMAGE, PATCH, *MARKS))
    if (marks := tokens.count(image)) != len(grids):
        raise VicugnaError(f"{len(grids)} pictures, but the chat template shows {marks}",
                           "messages", "Put pictures where the template takes them, such as into "
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

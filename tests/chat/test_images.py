"""Pictures in a chat: the tiles and tokens of transformers' Llama4Processor, and clean refusals."""

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import FEATURES, SIDE, encoded, picture, url, user
from PIL import Image
from transformers.image_utils import load_image

from vicugna.chat import encode, images
from vicugna.chat.image_settings import ImageSettings, digest_with_images
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

ANSWER = {"role": "assistant", "content": "A hill."}


def settings_of(tok: Tokenizer) -> ImageSettings | None:
    return ImageSettings.read(tok.processors)


def read(tok: Tokenizer, chat: list[dict[str, Any]]) -> tuple[list[int], torch.Tensor]:
    """For a network whose config fits the tokenizer."""
    return images.encode_with_images(tok, chat, SIDE, FEATURES, tok.id_of("<|patch|>") or 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Path]:
    """Our tokenizer and transformers' processor, from the same files."""
    return _pair(tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def enlarging(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Path]:
    """As `pair`, where pictures become as large as they can."""
    return _pair(tmp_path_factory.mktemp("large"), resize_to_max_canvas=True, max_patches=12)


def _pair(folder: Path, **settings: Any) -> tuple[Tokenizer, Any, Path]:
    theirs = pictures.processor(folder, **settings)
    return Tokenizer(folder), theirs, folder


def agree(ours: ImageSettings, theirs: Any, made: Image.Image) -> None:
    """The same tiles, to the last bit."""
    due = theirs(images=[made], return_tensors="pt")
    got, grid = images.tiles(made, ours)
    assert got.dtype == torch.bfloat16
    assert grid == tuple(due["aspect_ratios"][0].tolist())
    assert torch.equal(got, due["pixel_values"].flatten(0, -4))


@pytest.mark.parametrize("size", [
    (24, 24), (24, 25), (1, 1), (30, 70), (70, 30), (100, 100), (300, 20), (5, 60), (384, 24),
    (97, 96), (1, 5000), (5000, 1), (11, 22), (29, 58), (37, 74)], ids=str)  # the last: float32's
@pytest.mark.parametrize("most", [1, 5, 16])
@pytest.mark.parametrize("largest", [False, True])
def test_tiles_are_those_of_transformers(size: tuple[int, int], most: int, largest: bool) -> None:
    agree(ImageSettings(SIDE, FEATURES, most, largest), pictures.image_processor(
        max_patches=most, resize_to_max_canvas=largest), picture(*size))


@given(height=st.integers(1, 400), width=st.integers(1, 400), side=st.sampled_from([4, 10, 28]),
       most=st.integers(1, 20), largest=st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_picture_is_laid_out_as_by_transformers(height: int, width: int, side: int, most: int,
                                                    largest: bool) -> None:
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    theirs = pictures.image_processor(
        size={"height": side, "width": side}, max_patches=most, resize_to_max_canvas=largest,
        image_mean=list(mean), image_std=list(std), rescale_factor=1 / 200)
    agree(ImageSettings(side, 1, most, largest, 1 / 200, mean, std), theirs, picture(height, width))


@pytest.mark.parametrize("size", [(50, 90), (400, 300), (7, 5)], ids=str)
def test_resizing_is_within_one_of_pillows(size: tuple[int, int]) -> None:
    made = picture(*size)
    whole = images.tiles(made, ImageSettings(SIDE, FEATURES, max_patches=2))[0][-1]
    if size == (7, 5):  # one tile: no smaller picture of the whole
        height, width = 24, 17
        whole = whole[:, :height, :width]
    else:
        height = width = SIDE
    due = np.array(made.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    near = (whole.float() / 2 + 0.5) * 255
    assert (near - torch.from_numpy(due)).abs().max() < 1.6  # of which 0.5 is bfloat16's


CHATS: dict[str, list[dict[str, Any]]] = {
    "one tile": [user(picture(20, 24), "What is it?")],
    "wide": [user(picture(20, 70), "What is it?")],
    "high": [user(picture(100, 30), "What is it?")],
    "all tiles": [user(picture(96, 96), " What is it? ")],
    "several": [{"role": "system", "content": "Look."},
                user("First ", picture(30, 60), picture(10, 10), " and ", picture(90, 20)), ANSWER,
                user(picture(48, 48)), ANSWER, user("So?")],
    "none": [{"role": "system", "content": "Look."}, user("First "), ANSWER, user("So?")],
    "typed": [user("<|image|> is no <|patch|>, <|image_start|>", picture(30, 20), "<|image|>")],
    "a text": [{"role": "user", "content": "Hello"}, ANSWER, user(picture(30, 20), "é 漢")],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=list(CHATS))
def test_tokens_are_those_of_transformers(
        chat: list[dict[str, Any]], pair: tuple[Tokenizer, Any, Path],
        enlarging: tuple[Tokenizer, Any, Path]) -> None:
    for tok, theirs, _ in (pair, enlarging):
        due = theirs.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True,
            return_tensors="pt", sanitize_control_tokens=True)
        if "pixel_values" not in due:
            assert encode(tok, chat) == due["input_ids"][0].tolist()
            continue
        tokens, seen = read(tok, chat)
        assert tokens == due["input_ids"][0].tolist()
        assert torch.equal(seen, due["pixel_values"].flatten(0, -4))


# Where a picture comes from.

def colours(source: Any, key: str = "image") -> np.ndarray:
    part = {"type": "image", key: source}
    return np.array(images._opened(part, "messages[0].content[0]"))


@pytest.mark.parametrize("form", images.FORMATS)
def test_a_picture_a_file_and_a_url_are_the_same(form: str, tmp_path: Path) -> None:
    data = encoded(picture(30, 40), form)
    (tmp_path / "a").write_bytes(data)
    due = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    for source, key in ((Image.open(tmp_path / "a"), "image"), (tmp_path / "a", "path"),
                        (str(tmp_path / "a"), "image"), (url(data), "url"), (url(data), "image")):
        assert (colours(source, key) == due).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "LA", "PA",
                                  "RGBA"])
def test_every_mode_becomes_what_transformers_makes_of_it(mode: str) -> None:
    made = picture(30, 40)
    if "A" in mode and mode != "LAB":
        made.putalpha(made.getchannel("R"))
    made = (made.convert("P") if mode == "PA" else made).convert(mode)
    assert made.mode == mode
    due = pictures.image_processor().process_image(made, do_convert_rgb=True)
    assert (colours(made).transpose(2, 0, 1) == due.numpy()).all()


def test_what_is_transparent_is_white() -> None:
    made = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    made.putpixel((0, 0), (255, 0, 0, 255))
    assert colours(url(encoded(made)), "url").tolist() == [[[255, 0, 0], [255, 255, 255]]]
    listed = Image.new("P", (2, 1))
    listed.putpalette([255, 0, 0, 0, 255, 0])
    listed.putpixel((1, 0), 1)
    data = encoded(listed, transparency=1)
    assert colours(url(data), "url").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_file_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    (tmp_path / "a.jpg").write_bytes(encoded(picture(20, 40), "JPEG", exif=exif))
    turned = colours(tmp_path / "a.jpg", "path")
    assert turned.shape == (40, 20, 3)
    assert (turned == np.array(load_image(str(tmp_path / "a.jpg")))).all()
    # One of Pillow's, its owner has in hand: transformers takes it as it is, and so do we.
    assert colours(Image.open(tmp_path / "a.jpg")).shape == (20, 40, 3)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever it holds."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


def frames(form: str) -> bytes:
    return encoded(picture(9, 9), form, save_all=True, append_images=[picture(9, 9, 1)])


WHOLE = encoded(picture(30, 40))
DEEP = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
BAD: dict[str, tuple[Any, str]] = {
    "cut": (url(WHOLE[:-200]), "cannot be read"),
    "cut JPEG": (url(encoded(picture(90, 90), "JPEG")[:900]), "cannot be read"),
    "text": (url(b"hello" * 100), "cannot be read"), "empty": (url(b""), "cannot be read"),
    "nothing in it": (url(png(9, 9)), "cannot be read"),
    "a bomb": (url(png(65535, 65535)), "pixels"), "long": (url(png(2**31 - 1, 1)), "pixels"),
    "large": (url(png(50_000_001, 1)), "50000001 * 1 pixels"),
    "no pixels": (Image.new("RGB", (0, 5)), "0 * 5 pixels"),
    "PostScript": (url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot be read"),
    "TIFF": (url(encoded(picture(9, 9), "TIFF")), "JPEG, PNG, GIF, WEBP"),
    "animated GIF": (url(frames("GIF")), "animated"),
    "animated PNG": (url(frames("PNG")), "animated"),
    "animated WEBP": (url(frames("WEBP")), "animated"),
    "16 bits": (url(encoded(DEEP)), "8 bits"), "16 bits of Pillow": (DEEP, "8 bits"),
    "a web page": ("https://example.org/a.png", "nothing is fetched"),
    "plain http": ("http://example.org/a.png", "nothing is fetched"),
    "not base64": ("data:image/png;base64,@@@@", "base64"),
    "no base64": ("data:image/png,abc", "base64"), "no content": ("data:;base64", "base64"),
    "a file's URL": ("file:///etc/hostname", "nothing is fetched"),
    "a path as URL": ("/etc/hostname", "nothing is fetched"),
}


@pytest.mark.parametrize(("source", "says"), BAD.values(), ids=list(BAD))
def test_a_bad_picture_is_refused_in_one_line(source: Any, says: str) -> None:
    key = "url" if isinstance(source, str) else "image"
    with pytest.raises(VicugnaError) as caught:
        colours(source, key)
    assert says in str(caught.value) and "messages[0].content[0]" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_other_things_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which would hang
    for source, key in (
            (tmp_path / "none", "path"), (tmp_path, "path"), (tmp_path / "pipe", "path"),
            ("https://example.org/a.png", "path"), ("\0", "path"), ("x" * 5000, "path"),
            (3, "image"), (b"x", "image"), (None, "image"), ([], "path")):
        with pytest.raises(VicugnaError):
            colours(source, key)
    for part in ({"type": "image"}, {"type": "image", "image": picture(9, 9), "path": "a"},
                 {"type": "image_url", "image_url": {"url": url(WHOLE)}}):
        with pytest.raises(VicugnaError, match="not one image"):
            images._opened(part, "here")


# Whether the model and its files take pictures at all.

def test_a_network_and_files_that_do_not_fit(pair: tuple[Tokenizer, Any, Path]) -> None:
    tok, chat = pair[0], [user(picture(9, 9), "?")]
    patch = tok.id_of("<|patch|>") or 0
    for size, tokens, id, says in ((SIDE, FEATURES, 3, "image_token_index is 3"),
                                   (28, 9, patch, "takes 28"), (SIDE, 4, patch, "and 4")):
        with pytest.raises(VicugnaError, match=says):
            images.encode_with_images(tok, chat, size, tokens, id)


def test_pictures_that_the_template_does_not_show(pair: tuple[Tokenizer, Any, Path]) -> None:
    tok, hidden = pair[0], {**user(picture(9, 9)), "role": "tool"}
    with pytest.raises(VicugnaError, match="1 images, but the chat template shows 0"):
        read(tok, [user("?"), hidden])


def change(folder: Path, target: Path, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    """The files in `folder` with other settings of images, written as before transformers 5."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    outer = json.loads((folder / "processor_config.json").read_text())
    inner = outer.pop("image_processor") | settings
    (target / "processor_config.json").write_text(json.dumps(outer))
    (target / "preprocessor_config.json").write_text(json.dumps(inner))
    for name in drop:
        (target / name).unlink()
    return target


def test_settings_are_read_saved_and_part_of_the_digest(pair: tuple[Tokenizer, Any, Path],
                                                        tmp_path: Path) -> None:
    tok, _, folder = pair
    assert settings_of(tok) == ImageSettings(SIDE, FEATURES)
    for name in ("older", "other", "saved", "none"):
        (tmp_path / name).mkdir()
    older = Tokenizer(change(folder, tmp_path / "older"))
    assert settings_of(older) == settings_of(tok)
    assert digest_with_images(older) == digest_with_images(tok)
    other = Tokenizer(change(folder, tmp_path / "other", max_patches=4, size=SIDE,
                             image_std=[0.5, 0.25, 0.5]))
    assert settings_of(other) == ImageSettings(SIDE, FEATURES, 4, image_std=(0.5, 0.25, 0.5))
    assert digest_with_images(other) != digest_with_images(tok)
    other.save(tmp_path / "saved")
    saved = Tokenizer(tmp_path / "saved")
    assert settings_of(saved) == settings_of(other)
    assert digest_with_images(saved) == digest_with_images(other)
    # Without the files, as beside Meta's weights, the defaults and the network decide.
    none = Tokenizer(change(folder, tmp_path / "none", drop=(
        "processor_config.json", "preprocessor_config.json")))
    assert settings_of(none) is None
    chat = [user(picture(30, 40), "?")]
    (tokens, seen), due = (read(t, chat) for t in (none, tok))
    assert tokens == due[0] and torch.equal(seen, due[1])


def test_an_unknown_way_to_prepare_pictures(pair: tuple[Tokenizer, Any, Path], tmp_path: Path
                                            ) -> None:
    tok = Tokenizer(change(pair[2], tmp_path, drop=("processor_config.json",),
                           image_processor_type="PixtralImageProcessor"))
    assert settings_of(tok) is None
    with pytest.raises(VicugnaError, match="unknown way"):
        read(tok, [user(picture(9, 9))])


@pytest.mark.parametrize("wrong", [
    {"size": {"height": 24, "width": 25}}, {"size": {"shortest_edge": 24}}, {"size": 0},
    {"size": 2**40}, {"size": "24"}, {"max_patches": 0}, {"max_patches": 10**9},
    {"max_patches": True}, {"resize_to_max_canvas": 1}, {"image_mean": [0.5, 0.5]},
    {"image_mean": ["a"] * 3}, {"image_std": [0.5, 0, 0.5]}, {"image_std": 0},
    {"rescale_factor": float("nan")}, {"rescale_factor": "x"}, {"rescale_factor": 10**400},
    {"do_resize": False},
    {"do_normalize": False}, {"do_rescale": False}, {"do_convert_rgb": False}, {"resample": 3}],
    ids=str)
def test_settings_that_cannot_be_are_named(pair: tuple[Tokenizer, Any, Path], tmp_path: Path,
                                           wrong: dict[str, Any]) -> None:
    with pytest.raises(VicugnaError, match=next(iter(wrong))) as caught:
        digest_with_images(Tokenizer(change(pair[2], tmp_path, **wrong)))
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize("wrong", [
    {"patch_size": 0}, {"patch_size": 25}, {"patch_size": "4"}, {"pixel_shuffle_ratio": 0},
    {"pixel_shuffle_ratio": 1e-200}, {"pixel_shuffle_ratio": 2}, {"image_processor": 3}], ids=str)
def test_settings_of_the_processor_that_cannot_be(pair: tuple[Tokenizer, Any, Path],
                                                  tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = change(pair[2], tmp_path) / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(VicugnaError, match=next(iter(wrong))) as caught:
        digest_with_images(Tokenizer(tmp_path))
    assert "processor_config.json" in str(caught.value)


def test_a_url_is_not_shown_to_the_template(pair: tuple[Tokenizer, Any, Path]) -> None:
    """A template that writes messages out cannot put pictures into words."""
    tok, seen = pair[0], {"type": "image", "url": url(WHOLE)}
    tokens, _ = read(tok, [{"role": "user", "content": [seen]}])
    assert base64.b64encode(WHOLE)[:20].decode() not in tok.decode(tokens, skip_special=False)


def test_a_phones_jpeg_with_a_small_copy_in_it() -> None:
    data = encoded(picture(30, 40), "MPO", save_all=True, append_images=[picture(15, 20)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert colours(url(data), "url").shape == (30, 40, 3)

"""What a checkpoint's files say of its tokenizer, besides tokenizer.json itself."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken

from vicugna import files
from vicugna.errors import VicugnaError

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of images
# What is done to a picture whatever these keys say; another value was meant for other pixels.
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
         "resample": 2}  # bilinear


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes tiles of `size` * `size` pixels (see images.py), of which each is
    `features` tokens of text. The defaults are those of transformers' Llama4Processor."""

    size: int = 336
    features: int = 144
    max_patches: int = 16  # tiles of a picture, the one of all of it not counted
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


@dataclass
class Settings:
    """tokenizer_config.json without its template, special_tokens_map.json, added_tokens.json (a
    name's id), the chat templates by name, the ids that generation_config.json, or else
    config.json, has for "bos", "eos" and "pad", and the files PROCESSORS by name."""

    config: dict[str, Any] = field(default_factory=dict)
    names_map: dict[str, Any] = field(default_factory=dict)
    older: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)
    processors: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """The named tokens, such as bos_token, of which a template may speak."""
        contents = {key: _content(value) for key, value in self._merged.items()
                    if key.endswith("_token")}
        return {key: name for key, name in contents.items() if isinstance(name, str) and name}

    @property
    def _merged(self) -> dict[str, Any]:
        # As transformers has it: the newer form of the one file makes the other one void.
        newer = "added_tokens_decoder" in self.config
        return self.config if newer else {**self.config, **self.names_map}

    @property
    def added_ids(self) -> dict[str, int]:
        """The ids that the files give to added tokens, by name."""
        listed = self.config.get("added_tokens_decoder") or {}
        return {_content(token): int(id) for id, token in listed.items()} or self.older

    def added(self, known: Collection[str]) -> Iterator[AddedToken]:
        """The tokens to add, or to correct, where the added ones of tokenizer.json are `known`."""
        listed = self.config.get("added_tokens_decoder") or {}
        for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
            yield _token(token, special=False)
        more = [self._merged.get(key) for key in ("additional_special_tokens",
                                                  "extra_special_tokens")]
        lists = [list(them.values()) if isinstance(them, dict) else them or [] for them in more]
        named = [value for key, value in self._merged.items() if key in self.names]
        special = {_content(token): token for token in [*named, *lists[0], *lists[1]]}
        known = {*known, *(token["content"] for token in listed.values())}
        older = {} if listed else dict(sorted(self.older.items(), key=lambda item: item[1]))
        for name in [*older, *(name for name in special if name not in older)]:
            if name not in known:
                yield _token(special[name], special=True) if name in special else AddedToken(name)


def read(folder: Path) -> Settings:
    """The settings of the checkpoint in `folder`; VicugnaError for a broken file."""
    config = _object(folder / "tokenizer_config.json")
    template = config.pop("chat_template", None)
    if template is None:
        template = _object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name: of tools, of documents ...
        template = {one["name"]: one["template"] for one in template}
    templates = template if isinstance(template, dict) else {"default": template}
    paths = {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    if (folder / "chat_template.jinja").exists():
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        templates = {name: files.read_text(path) for name, path in sorted(paths.items())}
    templates = {name: text for name, text in templates.items() if text is not None}
    if not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise ValueError("a chat template that is no text")
    return Settings(config, _object(folder / "special_tokens_map.json"),
                    _object(folder / "added_tokens.json"), templates, _ids(folder),
                    {name: _object(folder / name) for name in PROCESSORS
                     if (folder / name).exists()})


def _ids(folder: Path) -> dict[str, list[int]]:
    model = _object(folder / "config.json")
    text = model.get("text_config")
    ids: dict[str, list[int]] = {}
    for source in (_object(folder / "generation_config.json"), model,
                   text if isinstance(text, dict) else {}):
        for kind in ("bos", "eos", "pad"):
            given = source.get(f"{kind}_token_id")
            found = [id for id in (given if isinstance(given, list) else [given])
                     if type(id) is int and id >= 0]
            if found:
                ids.setdefault(kind, found)
    return ids


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(token: Any, special: bool) -> AddedToken:
    """A token as files have it: a name, or an object with flags."""
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=False)
    flags = {flag: bool(token[flag]) for flag in FLAGS if flag in token}
    return AddedToken(token["content"], **({"special": special} | flags))


def _object(path: Path) -> dict[str, Any]:
    content = files.read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise VicugnaError("not a JSON object", str(path), "Get the file again")
    return content

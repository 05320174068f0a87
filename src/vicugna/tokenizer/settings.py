"""A checkpoint's tokenizer settings, from the files beside tokenizer.json."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from vicugna import files
from vicugna.errors import VicugnaError

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of images


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

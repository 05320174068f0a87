"""Chat templates are programs from strangers: run them without letting them reach out or run on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from vicugna.errors import VicugnaError

MAX_SECONDS = 10.0
MAX_LOOPS = 200_000
MAX_SIZE = 30_000  # of any text, list or number a template builds, beyond 4 times its input
# What pads or repeats without an operator; no chat template needs it.
_BANNED_FILTERS = ("center", "format", "wordwrap", "pprint", "xmlattr", "urlize", "batch", "slice")
_BANNED_METHODS = {"ljust", "rjust", "center", "zfill", "expandtabs"}


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, plus limits on time, loops and sizes."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=["jinja2.ext.loopcontrols"])
        for name in _BANNED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form[:100])
        self.deadline, self.loops_left, self.max_size = 0.0, 0, MAX_SIZE

    def tick(self) -> None:
        """Called at the start of each pass of each loop and each macro."""
        self.loops_left -= 1
        if self.loops_left < 0 or time.monotonic() > self.deadline:
            raise SecurityError("it runs for too long")

    def bounded(self, value: Any, size: float = 0) -> Any:
        """The value itself, or SecurityError when it (or `size`) is too large for a chat."""
        if max(size, _size(value)) > self.max_size:
            raise SecurityError("it builds something too large")
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        padding = isinstance(obj, str) and attr in _BANNED_METHODS
        return not padding and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("it formats text with format")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("it formats text with %")
        if operator == "**":
            self.bounded(None, (2 + _size(left)) ** min(_size(right), 64))
        if operator == "*":
            self.bounded(None, _size(left) * _size(right))
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        return self.bounded(super().call(context, obj, *args, **kwargs))


def _size(value: Any) -> float:
    if isinstance(value, int | float):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    if _size(indent) > 16:
        raise SecurityError("it indents too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _guard(tree: nodes.Template, environment: _Environment) -> nodes.Template:
    """Put a tick into every loop and macro, and make `~` a sum, which is limited."""
    for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        block.body.insert(0, nodes.ExprStmt(tick))  # type: ignore[attr-defined]
    for constant in tree.find_all(nodes.Const):
        environment.bounded(constant.value)
    for parent in list(tree.find_all(nodes.Node)):
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _as_sum(value))
            elif isinstance(value, list):
                value[:] = [_as_sum(x) if isinstance(x, nodes.Concat) else x for x in value]
    tree.set_environment(environment)
    tree.set_lineno(1)
    return tree


def _as_sum(concat: nodes.Concat) -> nodes.Expr:
    total: nodes.Expr = nodes.Const("")
    for part in concat.nodes:
        total = nodes.Add(total, nodes.Filter(part, "string", [], [], None, None))
    return total


class Template:
    """A compiled chat template. `render` may be called from several threads."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment, self._lock = _Environment(), threading.Lock()
        self._compiled: jinja2.Template = self._safely(lambda: self._environment.from_string(
            _guard(self._environment.parse(source), self._environment)))

    def render(self, size: int, **variables: Any) -> str:
        """The template's text for these variables, whose strings hold `size` characters.

        Raises VicugnaError for any failure, including a template that runs for too long.
        """
        with self._lock:
            self._environment.deadline = time.monotonic() + MAX_SECONDS
            self._environment.loops_left = MAX_LOOPS
            self._environment.max_size = MAX_SIZE + 4 * size
            return self._safely(lambda: self._compiled.render(**variables))

    def _safely(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a stranger's program may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise VicugnaError(f"the chat template refused or failed: {reason}",
                               "chat_template.jinja",
                               "Correct the messages or the template") from error

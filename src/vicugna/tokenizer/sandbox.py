"""Chat templates are programs from strangers: run them without letting them reach out or run on."""

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

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


class _Guard(NodeTransformer):
    """Puts a tick into every loop and macro, and makes `~` a sum, which is limited."""

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        total: nodes.Expr = nodes.Const("")
        for part in node.nodes:
            total = nodes.Add(total, nodes.Filter(part, "string", [], [], None, None))
        return self.generic_visit(total)


class Template:
    """A compiled chat template. `render` may be called from several threads."""

    def __init__(self, source: str) -> None:
        self.source, self._environment, self._lock = source, _Environment(), threading.Lock()
        self._compiled: jinja2.Template = self._safely(self._compile)

    def _compile(self) -> jinja2.Template:
        tree = _Guard().visit(self._environment.parse(self.source))
        for constant in tree.find_all(nodes.Const):
            self._environment.bounded(constant.value)
        return self._environment.from_string(tree.set_environment(self._environment).set_lineno(1))

    def render(self, size: int, **variables: Any) -> str:
        """The text for these variables, whose strings hold `size` characters in all. Raises
        VicugnaError for any failure, a template that runs for too long included."""
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
                               "chat_template.jinja", "Correct the messages or the template"
                               ) from error

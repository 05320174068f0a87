"""Chat templates are programs from strangers: run them without letting them reach out or run on."""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from vicugna.errors import VicugnaError

MAX_SECONDS = 0.5  # of the processor, and another second for every
CHARACTERS = 100_000  # characters of the input
MAX_LOOPS = 200_000
MAX_SOURCE = 60_000  # characters of a template; the longest known has 30,000
MAX_SIZE = 30_000  # of any text, list or number a template builds, beyond 4 times its input
# What pads or repeats without an operator; no chat template needs it.
_BANNED_FILTERS = ("center", "format", "wordwrap", "pprint", "xmlattr", "urlize", "batch", "slice")
_BANNED_METHODS = {"ljust", "rjust", "center", "zfill", "expandtabs"}
# What looks for its first argument (or for any) in a text.
_SEARCHES = {"count", "endswith", "find", "index", "lstrip", "partition", "removeprefix",
             "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
             "split", "startswith", "strip"}


class _Generation(Extension):
    """{% generation %}: the words of the assistant, with a scope of their own."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, plus limits on time, loops and sizes."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=[_Generation, loopcontrols])
        for name in _BANNED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = self.to_json
        self.filters = {name: self.timed(filter) for name, filter in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form[:100])
        self.deadline, self.loops_left, self.max_size = 0.0, 0, MAX_SIZE
        self.hide: Callable[[str], str] = str
        self.hidden: set[str] = set()  # what `hide` puts in place of other characters

    def tick(self) -> None:
        self.loops_left -= 1
        self.in_time()

    def in_time(self) -> None:
        """Raise SecurityError when time or loops are up."""
        if self.loops_left < 0 or time.thread_time() > self.deadline:
            raise SecurityError("it runs for too long")

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that only begins in time."""
        @wraps(work)
        def filter(*args: Any, **kwargs: Any) -> Any:
            self.in_time()
            return work(*args, **kwargs)
        return filter

    def bounded(self, value: Any, size: float = 0) -> Any:
        """The value itself, or SecurityError when it (or `size`) is too large for a chat."""
        if max(size, _size(value)) > self.max_size:
            raise SecurityError("it builds something too large")
        return value

    def to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
                separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """transformers' filter, which unlike Jinja's own leaves < and > alone."""
        if _size(indent) > 16:
            raise SecurityError("it indents too far")
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators,
                          sort_keys=sort_keys)
        if not ensure_ascii:
            return text
        kept = self.hidden  # which stand for characters of ASCII
        return re.sub(r"[^\x00-\x7f]", lambda m: m[0] if m[0] in kept else json.dumps(m[0])[1:-1],
                      text)

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
        self.in_time()
        return self.bounded(super().call(context, obj, *args, **kwargs))


def _size(value: Any) -> float:
    if isinstance(value, int | float):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Guard(NodeTransformer):
    """Puts a tick into every loop and macro, makes `~` a sum, which is limited, and hides in what
    a template compares people's text with the `parts` that are hidden in that."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = parts

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._hidden(node.expr)
        for operand in node.ops:
            operand.expr = self._hidden(operand.expr)
        return node

    def visit_Call(self, node: nodes.Call | nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        name = node.name if isinstance(node, nodes.Filter) else getattr(node.node, "attr", None)
        if name in _SEARCHES:
            node.args[:1] = map(self._hidden, node.args[:1])
        return node

    visit_Filter = visit_Call

    def _hidden(self, node: nodes.Expr) -> nodes.Expr:
        if isinstance(node, nodes.List | nodes.Tuple):
            node.items = list(map(self._hidden, node.items))
        if not (isinstance(node, nodes.Const) and isinstance(node.value, str)
                and any(part in node.value for part in self._parts)):
            return node
        return nodes.Call(nodes.EnvironmentAttribute("hide"), [node], [], None, None)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        total: nodes.Expr = nodes.Const("")
        for part in node.nodes:
            total = nodes.Add(total, nodes.Filter(part, "string", [], [], None, None))
        return self.generic_visit(total)


class Template:
    """A compiled chat template. `render` may be called from several threads. `parts` are the
    parts of people's text that may be hidden."""

    def __init__(self, source: str, parts: Sequence[str] = ()) -> None:
        self.source, self.parts = source, parts
        self._environment, self._lock = _Environment(), threading.Lock()
        self._compiled: jinja2.Template = self._safely(self._compile)

    def _compile(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE:
            raise SecurityError("it is too long")
        tree = _Guard(self.parts).visit(self._environment.parse(self.source))
        for constant in tree.find_all(nodes.Const):
            self._environment.bounded(constant.value)
        return self._environment.from_string(tree.set_environment(self._environment).set_lineno(1))

    def render(self, size: int, hide: Callable[[str], str] = str, **variables: Any) -> str:
        """The text for these variables, whose strings hold `size` characters in all, some of which
        `hide` has replaced. Raises VicugnaError for any failure, also of time or memory."""
        with self._lock:
            self._environment.deadline = time.thread_time() + MAX_SECONDS + size / CHARACTERS
            self._environment.loops_left = MAX_LOOPS
            self._environment.max_size = MAX_SIZE + 4 * size
            self._environment.hide = hide
            self._environment.hidden = (set("".join(map(hide, self.parts)))
                                        - set("".join(self.parts)))
            return self._safely(lambda: self._compiled.render(**variables))

    def _safely(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a stranger's program may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise VicugnaError(f"the chat template refused or failed: {reason}",
                               "chat_template.jinja", "Correct the messages or the template"
                               ) from error

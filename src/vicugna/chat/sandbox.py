"""Chat templates are programs from strangers: run them without letting them reach out or run on."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date as Date
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any, Self

import jinja2
from jinja2 import filters, nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from vicugna.errors import VicugnaError

MAX_SECONDS = 0.3  # of the processor, and another second for every
CHARACTERS = 100_000  # characters of the input
MESSAGES = 400  # messages give another second for looking back from each over all before it,
MAX_LOOKING_BACK = 20.0  # twice as many four, and so on, up to so many
PAUSES = 25  # between two looks at the clock no more than this part of the time counts
MAX_LOOPS = 200_000
MAX_SOURCE = 40_000  # characters of a template; the longest known has 30,000
MAX_SIZE = 30_000  # of any text, list or number a template builds, beyond 4 times its input
MAX_OUTPUTS = 10  # times that may be written in all: what a macro writes, its caller writes again
# What pads or repeats without an operator; no chat template needs it.
_BANNED_FILTERS = ("center", "format", "wordwrap", "pprint", "xmlattr", "urlize", "batch", "slice")
_BANNED_METHODS = {"ljust", "rjust", "center", "zfill", "expandtabs", "translate",
                   "encode", "to_bytes"}  # bytes have methods of their own
# What looks for its first argument (or for any) in a text.
_SEARCHES = {"count", "endswith", "find", "index", "lstrip", "partition", "removeprefix",
             "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
             "split", "startswith", "strip"}


class JsonText(str):
    """JSON text, as calls' arguments often are: a text to the template, which `tojson` however
    gives as JSON instead of encoding it a second time."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Self:
        self = super().__new__(cls, text)
        self.value = value
        return self

    @classmethod
    def of(cls, value: Any) -> Any:
        """A value itself, or a JsonText if it is JSON text of an object."""
        if isinstance(value, str):
            with suppress(ValueError, RecursionError):
                if isinstance(decoded := json.loads(value), dict):
                    return cls(value, decoded)
        return value

    def items(self) -> Any:
        return self.value.items()


def _json_values(value: Any) -> Any:
    """A value with JsonTexts as what they say."""
    if isinstance(value, JsonText):
        return value.value
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    return [*map(_json_values, value)] if isinstance(value, list | tuple) else value


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
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         finalize=self.written, extensions=[_Generation, loopcontrols])
        for name in (*_BANNED_FILTERS, "random"):  # the same text every time
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": self.to_json, "join": self.join, "replace": self.replace,
                         "indent": self.indent, "round": self.round,
                         "items": lambda value: filters.do_items(
                             value.value if isinstance(value, JsonText) else value)}
        self.filters = {name: self.limited(filter) for name, filter in self.filters.items()}
        self.tests = {name: self.tested(test)  # type: ignore[arg-type]
                      for name, test in self.tests.items() if name != "sameas"} | {
                          "sameas": self.tests["sameas"]}  # which asks for the very object
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self.strftime_now
        self.date: Date | None = None  # that a template sees; None is today
        self.seconds, self.seconds_left, self.looked = 0.0, 0.0, 0.0
        self.loops_left, self.max_size = 0, MAX_SIZE
        self.characters_left = 0  # to be written
        self.hide: Callable[[str], str] = str
        self.hidden: set[str] = set()  # what `hide` puts in place of other characters
        self.known: dict[int, int] = {}  # how much the lists of the input hold, by identity

    def strftime_now(self, form: str) -> str:
        """The time now or, where a date is given, its midnight."""
        now = datetime.now() if self.date is None else datetime(*self.date.timetuple()[:3])
        return now.strftime(form[:100])

    @property
    def tick(self) -> None:
        """One more loop; a property, as the sandbox's calls would take most of a loop's time."""
        self.loops_left -= 1
        self.in_time()

    def in_time(self) -> None:
        """Raise SecurityError when time or loops are up. A machine that stands still for a while,
        or collects garbage, has the template's clock run on: it counts as one long step."""
        now = time.thread_time()
        self.seconds_left -= min(now - self.looked, self.seconds / PAUSES)
        self.looked = now
        if self.loops_left < 0 or self.seconds_left < 0:
            raise SecurityError("it runs for too long")

    def timed(self, value: Any) -> Any:
        """The value itself, in time."""
        self.in_time()
        return value

    def written(self, value: Any) -> Any:
        """The value itself, which a template is about to write."""
        self.characters_left -= len(value) if isinstance(value, str) else 1
        if self.characters_left < 0:
            raise SecurityError("it writes too much")
        return value if isinstance(value, str | Undefined) else self.bounded(value)

    def limited(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that only begins in time, and gives nothing too large, at once or in turn."""
        @wraps(work)
        def filter(*args: Any, **kwargs: Any) -> Any:
            self.in_time()
            self.bounded([arg for arg in args if isinstance(arg, Namespace)])
            made = work(*args, **kwargs)
            return map(self.written, made) if isinstance(made, Iterator) else self.bounded(made)
        return filter

    def tested(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A test that only begins in time; of two values, in the form in which they compare."""
        @wraps(work)
        def test(*args: Any) -> Any:
            self.in_time()
            return work(*map(self.compared, args) if len(args) > 1 else args)
        return test

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.in_time()  # paths of attributes, which filters follow, may be long
        return super().getitem(obj, argument)

    def compared(self, value: Any) -> Any:
        """The form in which a text equals people's: hidden, whoever wrote it. Of a list, its
        items; of an object, its keys."""
        self.in_time()
        if not self.hidden:
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list | tuple):
            items = [self.hide(x) if isinstance(x, str) else x for x in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {self.hide(x) if isinstance(x, str) else x: y for x, y in value.items()}
        return value

    def bounded(self, value: Any, size: float = 0) -> Any:
        """The value itself, or SecurityError when it (or `size`) is too large for a chat. A list
        counts with all that it holds, as often as it holds it: two names of one list cost nothing,
        and double what it takes to write it. Hence it may not hold what can still change."""
        self.in_time()
        left, inside = self.max_size - max(size, _size(value)), [value]
        while inside and left >= 0:
            item = inside.pop()
            known = self.known.get(id(item)) if isinstance(item, list | dict) else None
            if known is not None:
                left -= known
                continue
            left -= len(item) if isinstance(item, str) and item is not value else 1
            if isinstance(item, list | tuple | dict):
                inside += item
                inside += item.values() if isinstance(item, dict) else ()
            elif isinstance(item, Namespace):
                raise SecurityError("it puts a namespace where it could be written")
        if left < 0:
            raise SecurityError("it builds something too large")
        return value

    def text(self, value: Any) -> str:
        """What `~` joins."""
        return str(self.bounded(value))

    @pass_eval_context
    def join(self, context: EvalContext, value: Any, d: str = "", attribute: Any = None) -> str:
        items = self.bounded(list(value))
        self.bounded(None, len(items) * _size(d))
        return filters.do_join(context, items, d, attribute)

    @pass_eval_context
    def replace(self, context: EvalContext, s: str, old: str, new: str, count: int | None = None
                ) -> str:
        s, (old,) = self._sought(s, "replace", old)
        self.bounded(None, str(s).count(str(old)) * _size(new))
        return filters.do_replace(context, s, old, new, count)

    def indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.bounded(None, (str(s).count("\n") + 1) * _size(width))
        return filters.do_indent(s, width, first, blank)

    def round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        self.bounded(None, 100 * _size(precision))
        return filters.do_round(value, precision, method)

    def to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
                separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """transformers' filter, which unlike Jinja's own leaves < and > alone."""
        if _size(indent) > 16:
            raise SecurityError("it indents too far")
        text = json.dumps(_json_values(value), ensure_ascii=False, indent=indent,
                          separators=separators, sort_keys=sort_keys)
        if not ensure_ascii:
            return text
        kept = self.hidden  # which stand for characters of ASCII
        return re.sub(r"[^\x00-\x7f]", lambda m: m[0] if m[0] in kept else json.dumps(m[0])[1:-1],
                      text)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        banned = isinstance(obj, str | int) and attr in _BANNED_METHODS
        return not banned and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` of plain fields alone: {}, {0} or {name}."""
        if super().wrap_str_format(value) is None:
            return None
        text, name = str(value.__self__), value.__name__
        fields = list(Formatter().parse(text))
        if name != "format" or any(conversion or spec or not re.fullmatch(r"\w*", field or "")
                                   for _, field, spec, conversion in fields):
            raise SecurityError("it formats text with more than plain fields")

        def formatted(*args: Any, **kwargs: Any) -> str:
            texts, named = list(map(self.text, args)), {k: self.text(v) for k, v in kwargs.items()}
            longest = max(map(len, [*texts, *named.values()]), default=0)
            self.bounded(None, len(text) + len(fields) * longest)
            return text.format(*texts, **named)
        return formatted

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("it formats text with %")
        if operator == "**":
            self.bounded(None, (2 + _size(left)) ** min(_size(right), 64))
        if operator == "*":
            self.bounded(None, _size(left) * _size(right))
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is self:  # what _Guard puts in
            return super().call(context, obj, *args, **kwargs)
        self.in_time()
        for arg in args:
            if not isinstance(arg, Namespace):
                self.bounded(arg)
        if isinstance(owner, str) and name in _SEARCHES:
            if "sep" in kwargs:
                args = (kwargs.pop("sep"), *args)
            owner, args = self._sought(owner, name, *args)
            obj = getattr(owner, name)
        if isinstance(owner, str) and name == "join" and args:
            args = (self.bounded(list(args[0])),)
            self.bounded(None, len(owner) * len(args[0]))
        if isinstance(owner, str) and name == "replace" and isinstance(args[0], str):
            self.bounded(None, owner.count(args[0]) * _size(*args[1:2]))
        made = super().call(context, obj, *args, **kwargs)
        return made if isinstance(made, Namespace) else self.bounded(made)

    def _sought(self, text: Any, name: str, *args: Any) -> tuple[Any, tuple[Any, ...]]:
        """A text, and the arguments of a method that looks for the first of them in it, such that
        it is found whoever wrote it: in its hidden form."""
        if not self.hidden or type(text) is not str or not args:
            return text, args
        hidden = self.compared(args[0])
        if isinstance(hidden, str) and name.endswith("strip"):  # any of these characters
            hidden += args[0]
        else:
            for sought in args[0] if isinstance(args[0], tuple) else args[:1]:
                if isinstance(sought, str) and self.hide(sought) != sought:
                    text = text.replace(sought, self.hide(sought))
        return text, (hidden, *args[1:])


def _size(value: Any = None) -> float:
    if isinstance(value, int | float):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _measure(value: Any, known: dict[int, int]) -> int:
    """How much a value of the input holds, as `bounded` counts; every list and object in it is
    put into `known`."""
    if not isinstance(value, list | dict):
        return len(value) if isinstance(value, str) else 1
    items = [*value, *value.values()] if isinstance(value, dict) else value
    known[id(value)] = total = 1 + sum(_measure(item, known) for item in items)
    return total


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Guard(NodeTransformer):
    """Puts a tick into every loop and macro, makes `~` a sum, which is limited as lists and blocks
    are, and has texts compared in the form in which the `parts` of people's are hidden."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = parts

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick")))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data)  # which is counted when it is written

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _own("bounded", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        lists = node.name in ("varargs", "kwargs") and node.ctx == "load"  # of a macro
        return _own("bounded", node) if lists else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "string", [], [], None, None)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and (self._plain(node.expr) or self._plain(node.ops[0].expr)):
            quick = node.ops[0].op in ("eq", "ne")
            return node if quick else _own("timed", node)
        node.expr = _own("compared", node.expr)
        for operand in node.ops:
            operand.expr = _own("compared", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _own("timed", node) if isinstance(node.arg, nodes.Slice) else node

    def _plain(self, node: nodes.Expr) -> bool:
        """Whether nothing that a comparison with this constant asks can be hidden."""
        return isinstance(node, nodes.Const) and not (
            isinstance(node.value, str) and any(part in node.value for part in self._parts))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        total: nodes.Expr = nodes.Const("")
        for part in node.nodes:
            total = nodes.Add(total, _own("text", part))
        return self.generic_visit(total)


def _own(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of the environment's own function `name`."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


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

    def render(self, size: int, hide: Callable[[str], str] = str, date: Date | None = None,
               **variables: Any) -> str:
        """The text for these variables, which take `size` characters in all, some of which
        `hide` has replaced. Raises VicugnaError for any failure, also of time or memory."""
        with self._lock:
            messages = len(variables.get("messages", ()))  # which some templates look back over
            self._environment.seconds = (MAX_SECONDS + size / CHARACTERS
                                         + min((messages / MESSAGES)**2, MAX_LOOKING_BACK))
            self._environment.seconds_left = self._environment.seconds
            self._environment.looked = time.thread_time()
            self._environment.loops_left = MAX_LOOPS + 10 * size + messages**2
            self._environment.known = {}
            for value in variables.values():
                _measure(value, self._environment.known)
            self._environment.max_size = MAX_SIZE + 4 * size
            self._environment.characters_left = MAX_OUTPUTS * (MAX_SIZE + 4 * size)
            self._environment.hide, self._environment.date = hide, date
            self._environment.hidden = (set("".join(map(hide, self.parts)))
                                        - set("".join(self.parts)))
            return self._safely(lambda: self._compiled.render(**variables))

    def _safely(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a stranger's program may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise VicugnaError(f"the chat template refused or failed: {reason[:300]}",
                               "chat_template.jinja", "Correct the messages or the template"
                               ) from error

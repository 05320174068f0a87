"""The program that renders chat templates, which are untrusted code.

It is run by worker.py as a process of its own: a request a line of JSON on standard input, an
answer a line on standard output. Jinja's sandbox keeps templates from objects' inner attributes;
each rendering has a limit of processor time, at which the kernel ends the process, of memory, and
of the text it may write. Nothing of this package is imported.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import filters, nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

# Methods of texts that search for their first argument.
_SEARCHES = {"count", "endswith", "find", "index", "lstrip", "partition", "removeprefix",
             "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
             "split", "startswith", "strip"}


class JsonText(str):
    """JSON text, as calls' arguments often are: a text to the template, which `tojson` however
    gives as JSON instead of encoding it a second time."""

    value: Any

    def items(self) -> Any:
        return self.value.items()


def _json_values(value: Any) -> Any:
    """A value with each JsonText decoded."""
    if isinstance(value, JsonText):
        return value.value
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    return [*map(_json_values, value)] if isinstance(value, list | tuple) else value


class _Generation(Extension):
    """{% generation %}: a block of its own scope, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers. User-provided text comes escaped (template.py), so both sides of
    comparisons and searches are escaped: a template sees no difference."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         extensions=[_Generation, loopcontrols])
        for name in ("random", "pprint"):  # the same text every time
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {
            "tojson": self.to_json, "replace": self.replace,
            "items": lambda value: filters.do_items(_json_values(value))}
        self.tests = {name: test if name == "sameas" else self.compares(test)
                      for name, test in self.tests.items()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": self.strftime_now}
        self.swaps: list[tuple[str, str]] = []  # parts to escape, and the marks
        self.now = datetime.now()

    def escape(self, value: Any) -> Any:
        """A text with the first character of each escaped part replaced by its mark."""
        for part, mark in self.swaps if isinstance(value, str) else ():
            value = value.replace(part, mark + part[1:])
        return value

    def compared(self, value: Any) -> Any:
        """A value escaped for comparison: a text, a list's items, an object's keys."""
        if isinstance(value, list):
            return [self.escape(item) for item in value]
        if isinstance(value, tuple):
            return tuple(map(self.escape, value))
        if isinstance(value, dict):
            return {self.escape(key): item for key, item in value.items()}
        return self.escape(value)

    def compares(self, work: Any) -> Any:
        """A test that escapes its values where it compares two."""
        def test(*args: Any) -> Any:
            return work(*map(self.compared, args) if len(args) > 1 else args)
        return test

    def strftime_now(self, form: str) -> str:
        return self.now.strftime(form)

    @pass_eval_context
    def replace(self, context: EvalContext, s: str, old: str, new: str, count: int | None = None
                ) -> str:
        s, (old,) = self._sought(s, "replace", old)
        return filters.do_replace(context, s, old, new, count)

    def to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
                separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """transformers' filter, which unlike Jinja's own leaves < and > alone."""
        text = json.dumps(_json_values(value), ensure_ascii=False, indent=indent,
                          separators=separators, sort_keys=sort_keys)
        if not ensure_ascii:
            return text
        marks = {mark for _, mark in self.swaps}  # which stand for characters of ASCII
        return re.sub(r"[^\x00-\x7f]", lambda m: m[0] if m[0] in marks else json.dumps(m[0])[1:-1],
                      text)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in _SEARCHES:
            if "sep" in kwargs:
                args = (kwargs.pop("sep"), *args)
            owner, args = self._sought(owner, name, *args)
            obj = getattr(owner, name)
        return super().call(context, obj, *args, **kwargs)

    def _sought(self, text: Any, name: str, *args: Any) -> tuple[Any, tuple[Any, ...]]:
        """A text and a search method's arguments, with what is searched for escaped in both."""
        if not self.swaps or not isinstance(text, str) or hasattr(text, "__html__") or not args:
            return text, args
        escaped = self.compared(args[0])
        if isinstance(escaped, str) and name.endswith("strip"):  # any of these characters
            escaped += args[0]
        else:
            for sought in args[0] if isinstance(args[0], tuple) else args[:1]:
                if isinstance(sought, str) and self.escape(sought) != sought:
                    text = text.replace(sought, self.escape(sought))
        return text, (escaped, *args[1:])


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Comparisons(NodeTransformer):
    """Has values compared in their escaped form."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _compared(node.expr)
        for operand in node.ops:
            operand.expr = _compared(operand.expr)
        return node


def _compared(node: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("compared"), [node], [], None, None)


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[_Environment, jinja2.Template]:
    environment = _Environment()
    tree = _Comparisons().visit(environment.parse(source))
    return environment, environment.from_string(
        tree.set_environment(environment).set_lineno(1))


def _render(request: dict[str, Any]) -> str:
    environment, template = _compiled(request["source"])
    environment.swaps, date = request["swaps"], request["date"]
    environment.now = datetime.now() if date is None else datetime.fromisoformat(date)
    variables = request["variables"]
    calls = [call.get("function", call) for message in variables["messages"]
             for call in message.get("tool_calls") or []]
    for call, value in zip(calls, request["arguments"], strict=False):
        if value is not None:
            call["arguments"] = JsonText(call["arguments"])
            call["arguments"].value = value
    written, left = list[str](), request["characters"]
    for part in template.generate(**variables):
        left -= len(part)
        if left < 0:
            raise SecurityError("it writes too much")
        written.append(part)
    return "".join(written)


def _answers(requests: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    own = 0  # address space without any rendering; on Linux, which alone enforces the limit
    with suppress(OSError), open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    for line in requests:
        head, _, body = line.partition(b" ")  # the limits, before anything is read
        seconds, size = json.loads(head)
        if own:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            soft = own + size if hard == resource.RLIM_INFINITY else min(own + size, hard)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process
        try:
            yield {"text": _render(json.loads(body))}
        except MemoryError:
            yield {"error": "it takes too much memory", "broken": True}
        except BaseException as error:  # whatever the template's code may raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield {"error": reason[:300].rstrip(".")}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(BrokenPipeError):
        for answer in _answers(iter(sys.stdin.buffer)):
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")  # in any locale
            sys.stdout.buffer.flush()

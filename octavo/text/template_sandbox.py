"""Jinja for templates that may come from anywhere: what they may reach is Jinja's sandbox, how long they run and how
much they make is bounded here.

Python cannot interrupt a single operation, so each that could be long is looked at before: loops, macros, calls and
filters tick, which is when the clock is read; what an operator, a method or a filter is about to make is estimated
first (docs/decisions/0111). A traced environment also tells the template's own characters from all others (0124).
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import do_join, do_replace, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, pass_context, pass_eval_context
from markupsafe import Markup

from octavo.errors import RequestError
from octavo.text.origin import TracedMarkup, TracedText, foreign, is_own, joined, own

MOST_SECONDS = 10.0
MOST_CHARACTERS = 64 * 1024**2  # of a prompt, or of any text on the way to it
MOST_SOURCE = 1024**2  # characters of a template; long ones have 50,000

# Bytes of all that a template makes, kept or not: a chat's text a good many times over.
_MOST_BYTES = 8 * MOST_CHARACTERS
_PER_ITEM = 64  # an item of a list counts as so many characters
_WIDEST = 1024**2  # largest number that a method or filter may be given: a width, a count
_MOST_BITS = 100_000  # of a whole number
_LINE_ENDS, _WORDS = re.compile("[\n-\r\x1c-\x1e\x85\u2028\u2029]"), re.compile(r"\S+")
_WIDTH = re.compile(r"\*|\d{6,}")

# Filters that look at no text inside their first argument, which may then be long and is not measured each time.
_SHALLOW = {"length", "count", "first", "last", "default", "d", "map", "select", "reject", "selectattr", "rejectattr"}
_SHALLOW |= {"list", "reverse", "batch", "slice", "items", "attr", "random", "int", "float", "abs", "round", "safe"}
# Filters that make a list of a text's characters.
_OF_CHARACTERS = {"list", "sort", "slice"}
# Their numbers are no widths.
_ANY_NUMBER = {"default", "d", "int", "float"}
# For web pages; what they make grows in ways of its own.
_NOT_HERE = ("urlize", "xmlattr", "wordwrap")


class _Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self._until = time.monotonic() + MOST_SECONDS
        self._bytes = _MOST_BYTES
        self._characters = MOST_CHARACTERS

    def tick(self) -> None:
        if time.monotonic() > self._until:
            raise _refusal(f"runs for more than {MOST_SECONDS:g} seconds")

    def made(self, value: Any) -> None:
        """Counts a new value."""
        if isinstance(value, (str, bytes)):
            self._bytes -= sys.getsizeof(value)
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self._bytes -= _PER_ITEM * len(value)
        if self._bytes < 0:
            raise _too_long()

    def wrote(self, text: str) -> None:
        """Counts a piece of the prompt."""
        self.tick()
        self._characters -= len(text)
        if self._characters < 0:
            raise _too_long()


_budget: ContextVar[_Budget] = ContextVar("budget of a chat template")


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text, traced if the template is; raises `RequestError` if it takes too long or grows too large, and whatever
    the template raises."""
    budget = _Budget()
    token = _budget.set(budget)
    try:
        pieces = []
        for piece in template.generate(variables):
            budget.wrote(piece)
            pieces.append(piece)
        return joined(pieces)
    finally:
        _budget.reset(token)


def _refusal(what: str) -> RequestError:
    return RequestError(
        f"the model's chat template {what}; shorten the messages, or give another with the chat template option",
        "messages",
    )


def _too_long() -> RequestError:
    return _refusal(f"writes more than {MOST_CHARACTERS:,} characters")


def _limit(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise _too_long()


def _measure(*values: Any) -> int:
    """Characters that `values` would have as texts, about; past the bound no more of them is looked at."""
    size, left = 0, list(values)
    while left and size <= MOST_CHARACTERS:
        value = left.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
            continue
        size += _PER_ITEM
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        if isinstance(value, Collection):
            size += _PER_ITEM * len(value)
            if size <= MOST_CHARACTERS:
                left.extend(value)
                left.extend(value.values() if isinstance(value, Mapping) else ())
    return size


def _check_numbers(arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > _WIDEST:
            raise _refusal(f"asks for a text or a list of more than {_WIDEST:,} places")


def _check_format(pattern: Any, arguments: Any) -> None:
    """Widths are numbers inside a pattern of printf, or a specification of `str.format`; a star is an argument's."""
    # A mapping's values may be named again and again.
    times = str(pattern).count("%") if isinstance(arguments, Mapping) else 1
    _limit(_measure(pattern) + _measure(arguments) * times)
    for width in _WIDTH.findall(str(pattern)):
        _check_numbers([int(width[:9])] if width != "*" else arguments if isinstance(arguments, tuple) else [arguments])


class _Code(CodeGenerator):  # the names of its methods are Jinja's
    """Python that ticks, that makes nothing behind the environment's back, and whose texts are known as its own."""

    environment: "TemplateSandbox"

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        if self.environment.traced and isinstance(node.value, str):
            self.write(self._own(node.value))
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._own("".join(map(str, group))) if self.environment.traced else super()._output_const_repr(group)

    def _own(self, text: str) -> str:
        self.environment.own.append(own(text))
        return f"environment.own[{len(self.environment.own) - 1}]"

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self._calls("concat_any", node, frame, lambda: self._items(node.nodes, frame))

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._calls("nested", node, frame, lambda: super(_Code, self).visit_List(node, frame))

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "store":
            super().visit_Tuple(node, frame)
        else:
            self._calls("nested", node, frame, lambda: super(_Code, self).visit_Tuple(node, frame))

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._calls("nested", node, frame, lambda: super(_Code, self).visit_Dict(node, frame))

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._calls("made", node, frame, lambda: super(_Code, self).visit_Getitem(node, frame))
        else:
            super().visit_Getitem(node, frame)

    def _items(self, items: Iterable[nodes.Node], frame: Frame) -> None:
        self.write("(")
        for item in items:
            self.visit(item, frame)
            self.write(", ")
        self.write(")")

    def _calls(self, function: str, node: nodes.Node, frame: Frame, argument: Callable[[], None]) -> None:
        self.write(f"environment.{function}(")
        argument()
        self.write(")")


class _BoundedFields:
    """Of a formatter: each field is looked at before it is written, with a width that may stand anywhere."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pieces: list[list[str]] = []  # of the pattern, and of specifications within it

    def parse(self, pattern: str) -> Iterator[tuple[Any, ...]]:
        whole = own if is_own(pattern) else str
        for literal, *field in super().parse(pattern):  # type: ignore[misc]
            self._pieces[-1].append(whole(literal))
            yield literal, *field

    def _vformat(self, *args: Any, **kwargs: Any) -> tuple[str, Any]:
        self._pieces.append([])
        _, place = super()._vformat(*args, **kwargs)  # type: ignore[misc]
        return joined(self._pieces.pop()), place

    def format_field(self, value: Any, spec: str) -> Any:
        _check_format(spec, ())
        _limit(_measure(value))
        budget = _budget.get()
        budget.tick()
        text = super().format_field(value, spec)  # type: ignore[misc]
        budget.made(text)
        self._pieces[-1].append(text)
        return text


class _Formatter(_BoundedFields, SandboxedFormatter):
    pass


class _EscapeFormatter(_BoundedFields, SandboxedEscapeFormatter):
    pass


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Its templates are for `render` alone, since what they may take is counted there.

    In a `traced` one each text in a template's source is known as its own (`own`), and what is put together of such
    texts and others is a `TracedText`.
    """

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, traced: bool = False, **settings: Any):
        # Constants are not computed beforehand, when nobody counts.
        super().__init__(optimized=False, finalize=_finalize, **settings)
        self.traced = traced
        self.own: list[TracedText] = []
        del self.globals["lipsum"]
        for name in _NOT_HERE:
            del self.filters[name]
        if traced:
            self.filters |= {"join": _join_traced, "replace": _replace_traced, "safe": _safe_traced}
        for name, function in self.filters.items():
            self.filters[name] = _bounded(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _bounded(name, function)

    # ---- what templates call, see _Code -----------------------------------------------------------------------

    def tick(self) -> None:
        _budget.get().tick()

    def made(self, value: Any) -> Any:
        _budget.get().made(value)
        return value

    def nested(self, value: Any) -> Any:
        """A list, tuple or dictionary that was just written down: parts may be in it many times over."""
        _limit(_measure(value))
        return self.made(value)

    def concat_any(self, values: tuple[Any, ...]) -> str:
        _limit(_measure(*values))
        return str(self.made(joined(map(str, values))))

    def concat(self, pieces: Iterable[str]) -> str:
        """What a block or a macro wrote."""
        pieces = list(pieces)
        _limit(sum(map(len, pieces)))
        return str(self.made(joined(pieces)))

    # ---- Jinja's own extension points --------------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left, right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            times = abs(right) if operator == "**" else 1
            bits = left.bit_length() * min(times, _MOST_BITS) + (right.bit_length() if operator == "*" else 0)
            if bits > _MOST_BITS and abs(left) > 1:
                raise _refusal(f"computes a number of more than {_MOST_BITS:,} bits")
        elif operator == "*":
            value, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(value, Collection) and isinstance(times, int):
                _limit(_measure(value) * max(0, times))
        elif isinstance(left, (str, list)) and isinstance(right, (str, list)):
            _limit(len(left) + len(right))
        elif isinstance(left, Collection):
            _limit(_measure(left, right))
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        pattern, by_map = value.__self__, value.__name__ == "format_map"
        formatter: SandboxedFormatter = _Formatter(self)
        if isinstance(pattern, Markup):
            formatter = _EscapeFormatter(self, escape=pattern.escape)

        def bounded(*args: Any, **kwargs: Any) -> Any:
            _limit(_measure(pattern))
            if by_map:
                (kwargs,), args = args, ()
            text = formatter.vformat(pattern, args, kwargs)
            return self.made(type(pattern)(text) if isinstance(pattern, Markup) else text)

        return functools.update_wrapper(bounded, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)) and not isinstance(owner, bool):
            args = _check_method(owner, __obj.__name__, args, kwargs)
            if __self.traced and type(owner) is str and __obj.__name__ in ("join", "replace"):
                __obj = getattr(foreign(owner), __obj.__name__)  # what is put in may be the template's
        return __self.made(super().call(__context, __obj, *args, **kwargs))


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        _limit(_measure(value))
    return value


def _check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments for a method of a text or a number, once it is clear that what it makes is not too long."""
    _check_numbers([*args, *kwargs.values()])
    if name == "join" and args:
        args = (_as_list(args[0]), *args[1:])
        _limit(_measure(args[0]) + len(owner) * len(args[0]))
    elif name == "replace" and len(args) > 1:
        _check_replace(owner, args[0], args[1])
    elif name in ("split", "rsplit", "splitlines") and len(owner) > _WIDEST:
        _limit(_PER_ITEM * _pieces(owner, name, args, kwargs))
    elif name == "expandtabs":
        _limit(len(owner) * max([8, *args, *kwargs.values()]) if "\t" in owner else 0)
    elif name == "translate" and args:
        longest = max(map(_measure, args[0].values()), default=1) if isinstance(args[0], Mapping) else len(args[0])
        _limit(len(owner) * longest)
    return args


def _pieces(text: str | bytes, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many pieces a split makes, at most."""
    if isinstance(text, bytes):
        return len(text)
    if method == "splitlines":
        return 1 + sum(1 for _ in _LINE_ENDS.finditer(text))
    sep, most = (*args, *(None, -1)[len(args) :])[:2]
    sep, most = kwargs.get("sep", sep), kwargs.get("maxsplit", most)
    found = text.count(sep) if isinstance(sep, str) and sep else sum(1 for _ in _WORDS.finditer(text))
    return 1 + (min(found, most) if isinstance(most, int) and most >= 0 else found)


def _as_list(value: Any) -> list[Any]:
    """The items of any iterable, as long as there are not too many."""
    found: list[Any] = []
    size = 0
    for item in value:
        size += _PER_ITEM + (len(item) if isinstance(item, str) else 0)
        _limit(size)
        found.append(item)
    return found


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(old, str if isinstance(text, str) else type(text)) and isinstance(new, (str, type(text))):
        _limit(len(text) + text.count(old) * len(new))


@pass_eval_context
def _join_traced(context: nodes.EvalContext, value: Any, separator: Any = "", attribute: Any = None) -> Any:
    if context.autoescape:
        return do_join(context, value, separator, attribute)
    items = value if attribute is None else map(make_attrgetter(context.environment, attribute), value)
    return joined(map(str, items), str(separator))


@pass_eval_context
def _replace_traced(context: nodes.EvalContext, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    if context.autoescape:
        return do_replace(context, text, old, new, count)
    return foreign(str(text)).replace(str(old), str(new), -1 if count is None else count)


def _safe_traced(value: Any) -> Markup:
    return TracedMarkup(value) if isinstance(value, TracedText) else Markup(value)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which looks at its arguments before it works."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        value, others = args[first], [*args[first + 1 :], *kwargs.values()]
        if name == "join" and not isinstance(value, Collection):
            value = _as_list(value)
            args = (*args[:first], value, *args[first + 1 :])
        if not isinstance(value, Iterator) and (isinstance(value, str) or name not in _SHALLOW):
            _limit(_measure(value))
        if name in _OF_CHARACTERS and isinstance(value, str):
            _limit(len(value) * _PER_ITEM)
        if name not in _ANY_NUMBER:
            _check_numbers(others)
        if name in _CHECKS:
            _CHECKS[name](value, *others)
        result = function(*args, **kwargs)
        budget.made(result)
        return result

    return bounded


def _join(value: Any, separator: Any = "", *others: Any) -> None:
    _limit(_measure(value) + len(value) * _measure(separator))


def _replace(value: Any, old: Any = "", new: Any = "", *others: Any) -> None:
    _check_replace(str(value), str(old), str(new))


def _indent(value: Any, width: Any = 4, *others: Any) -> None:
    text = str(value)
    _limit(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))


def _sum(value: Any, *others: Any) -> None:
    if any(isinstance(start, (str, Collection)) and not isinstance(start, str) for start in others):
        raise _refusal("adds up lists, which the filter sum does not do here")


def _json(value: Any, *others: Any) -> None:
    _limit(_measure(value) * (1 + max((o for o in others if type(o) is int), default=0)))


_CHECKS: Mapping[str, Callable[..., None]] = {
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "format": lambda value, *others: _check_format(value, tuple(others)),
    "sum": _sum,
    "tojson": _json,
}

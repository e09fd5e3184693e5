"""Messages to a prompt, by the model's own Jinja template, without letting a message forge a special token.

A template runs in a sandbox (`template_sandbox`) with the names that transformers gives it. Roles and fields beyond the
text are the template's business; the HTTP shapes of messages are the server's.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from octavo.errors import RequestError, short
from octavo.log import logger
from octavo.text.special_text import Guard
from octavo.text.template_sandbox import MOST_SOURCE, TemplateSandbox, render

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

# Names that Jinja or Octavo gives to a template; as a caller's variables they would be hidden, or hide the messages.
RESERVED = frozenset(("self", "loop", "super", "caller", "varargs", "kwargs"))
RESERVED |= {"tokenizer", "template", "strict_compat", "messages", "tools", "add_generation_prompt"}

_MOST_WARNINGS = 16


class ChatTemplate:
    """A model's template, or several by name (`default`, `tool_use`: used when tools are given)."""

    def __init__(self, source: str | Mapping[str, str], *, bos_token: str = "", eos_token: str = ""):
        self.sources: dict[str, str] = {"default": source} if isinstance(source, str) else dict(source)
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: dict[str, jinja2.Template] = {}
        self._used: dict[str, set[str]] = {}  # variables that each reads
        self._warned: set[str] = set()

    def render(
        self,
        messages: Sequence[Message],
        /,  # a variable may have any name, `self` too
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text. `variables` go to the template as they are (`enable_thinking`, ...).

        Raises `RequestError` for messages that are not text, for what the template itself refuses or cannot do, and
        for a template that takes too long or writes too much.
        """
        check_variables(variables)
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        template = self._template(name)
        self._check_used(name, tools, variables)
        try:
            return render(
                template,
                self._variables
                | {"messages": plain_messages(messages), "tools": list(tools) if tools else None}
                | {"add_generation_prompt": add_generation_prompt}
                | variables,
            )
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from None
        except Exception as error:  # A template may do what any program may: divide by zero, recurse, fill the memory.
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RequestError(f"the model's chat template cannot use these messages: {why}", "messages") from None

    def _check_used(self, name: str, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> None:
        """Raises `RequestError` for tools that the template would not show; warns once of a variable that it does not
        read: it may be meant for another model."""
        used = self._used[name]
        if tools and "tools" not in used:
            raise RequestError(
                "the model's chat template does not show tools, so that the model would not know of them; leave them"
                " out, or give a template that does",
                "tools",
            )
        for unknown in variables.keys() - used - self._warned:
            if len(self._warned) == _MOST_WARNINGS:  # names are the clients'
                break
            self._warned.add(unknown)
            logger.warning("the model's chat template does not read %s, which changes nothing", short(unknown))

    def _template(self, name: str) -> jinja2.Template:
        if name not in self.sources:
            raise RequestError(
                f"the model's chat templates are {', '.join(self.sources)}, and none of them is for this "
                "request; "
                "give one with the chat template option",
                "messages",
            )
        if name not in self._compiled:
            source = self.sources[name]
            try:
                if len(source) > MOST_SOURCE:
                    raise jinja2.TemplateError(f"it has {len(source):,} characters")
                environment = _environment()
                self._used[name] = meta.find_undeclared_variables(environment.parse(source))
                self._compiled[name] = environment.from_string(source)
            except Exception as error:  # Python's compiler has limits of its own, and errors for each.
                raise RequestError(
                    f"the model's chat template is broken ({error or type(error).__name__}); give another with the"
                    " chat template option",
                    "messages",
                ) from None
        return self._compiled[name]


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raises `RequestError` for a caller's variable whose name is taken."""
    for name in variables.keys() & RESERVED:
        field = f"chat_template_kwargs.{name}"
        raise RequestError(f"{field} cannot be set: the name is the template's own, or has its own field", field)


def encode_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template: ChatTemplate | None = None,
    strict_compat: bool = False,
    **variables: Any,
) -> list[int]:
    """Token ids of a chat, rendered by `template` or by the model's own.

    Special tokens come from the template alone: a message that holds the text of one keeps it as text.
    `strict_compat=True` does as other engines do and lets messages write special tokens.
    Raises `RequestError`.
    """
    check_variables(variables)
    template = template or tokenizer.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template: use completions, or give a template with the chat template option",
            "messages",
        )
    messages = plain_messages(messages)
    try:
        guard = None if strict_compat else Guard.needed_for(tokenizer, [messages, tools, variables])
        if guard is not None:
            messages, tools, variables = (guard.protect(part) for part in (messages, tools, variables))
    except RecursionError:
        raise RequestError("messages, tools or chat_template_kwargs are nested too deeply", "messages") from None
    text = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
    if guard is None:
        return tokenizer.encode(text, add_bos=False)
    return guard.encode(text)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages whose content is a text or None; a list of text parts is joined. Raises `RequestError`."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of messages, each with a role and a content", "messages")
    if not messages:
        raise RequestError("messages is empty; give at least one message", "messages")
    return [_plain_message(message, index) for index, message in enumerate(messages)]


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is of type {type(message).__name__}; it must be an object", "messages")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where}.role is {message.get('role')!r}; it must be a text", "messages")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        plain["content"] = "".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise RequestError(f"{where}.content is of type {kind}; it must be a text or text parts", "messages")
    return plain


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise RequestError(f"{where} is of type {kind!r}; this model takes text parts only", "messages")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text is {part.get('text')!r}; it must be a text", "messages")
    return str(part["text"])


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's own words for training:

    plain text here.
    """

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


def _environment() -> TemplateSandbox:
    environment = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c into a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format)

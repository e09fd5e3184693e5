"""Messages to a prompt, by the model's own Jinja template, without letting a message forge a special token.

A template runs in a sandbox (`template_sandbox`) with the names that transformers gives it. Roles and fields beyond the
text are the template's business; the HTTP shapes of messages are the server's.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Const, Node, TemplateData
from jinja2.parser import Parser

from octavo.errors import RequestError, short
from octavo.log import logger
from octavo.text.origin import own
from octavo.text.special_text import SpecialText, encode_traced
from octavo.text.template_sandbox import MOST_SOURCE, TemplateSandbox, render

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

# Names that Jinja or Octavo gives to a template; as a caller's variables they would be hidden, or hide the messages.
RESERVED = frozenset(("self", "loop", "super", "caller", "varargs", "kwargs"))
RESERVED |= {"tokenizer", "template", "strict_compat", "messages", "tools", "add_generation_prompt"}

_MOST_WARNINGS = 16
# Words that templates know, and write into tokens ("<|" + role + "|>"). Such a role is as good as the template's own.
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"))


class _Template:
    """One source, compiled when it is first used, with the trace and without. Raises what Jinja and Python raise."""

    def __init__(self, source: str):
        if len(source) > MOST_SOURCE:
            raise jinja2.TemplateError(f"it has {len(source):,} characters")
        self._source = source
        environment = _environment(traced=False)
        syntax = environment.parse(source)
        self.used = meta.find_undeclared_variables(syntax)  # variables that it reads
        self.texts = {node.data for node in syntax.find_all(TemplateData)}
        self.texts |= {node.value for node in syntax.find_all(Const) if isinstance(node.value, str)}
        self.plain = environment.from_string(source)

    @cached_property
    def traced(self) -> jinja2.Template:
        return _environment(traced=True).from_string(self._source)


class ChatTemplate:
    """A model's template, or several by name (`default`, `tool_use`: used when tools are given).

    `tokens` are the texts of special tokens by their names; BOS and EOS are empty unless given, as no others are.
    """

    def __init__(self, source: str | Mapping[str, str], **tokens: str):
        self.sources: dict[str, str] = {"default": source} if isinstance(source, str) else dict(source)
        self._tokens = {"bos_token": "", "eos_token": ""} | tokens
        self._compiled: dict[str, _Template] = {}
        self._completes: dict[tuple[str, SpecialText], bool] = {}
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
        return self._render(plain_messages(messages), tools, add_generation_prompt, variables, None)

    def render_traced(
        self,
        special: SpecialText,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """As `render`, and what the template wrote by itself is known in the text (`origin`)."""
        return self._render(plain_messages(messages), tools, add_generation_prompt, variables, special)

    def completes_tokens(self, special: SpecialText, tools: Any) -> bool:
        """Whether the template may make a special token of a beginning of its own and of what others wrote."""
        name = self._name(tools)
        if (name, special) not in self._completes:
            own_texts = self._template(name).texts | set(self._tokens.values())
            self._completes[name, special] = special.could_end_elsewhere(own_texts)
        return self._completes[name, special]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        special: SpecialText | None,
    ) -> str:
        name = self._name(tools)
        template = self._template(name)
        self._check_used(template, tools, variables)
        tokens: Mapping[str, str] = self._tokens
        if special is not None:
            tokens = {name: own(text) for name, text in tokens.items()}
            messages = list(_with_own_roles(messages, special))
        try:
            return render(
                template.plain if special is None else template.traced,
                {**tokens, "messages": messages, "tools": list(tools) if tools else None}
                | {"add_generation_prompt": add_generation_prompt}
                | dict(variables),
            )
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from None
        except Exception as error:  # A template may do what any program may: divide by zero, recurse, fill the memory.
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RequestError(f"the model's chat template cannot use these messages: {why}", "messages") from None

    def _check_used(self, template: _Template, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> None:
        """Raises `RequestError` for tools that the template would not show; warns once of a variable that it does not
        read: it may be meant for another model."""
        if tools and "tools" not in template.used:
            raise RequestError(
                "the model's chat template does not show tools, so that the model would not know of them; leave them"
                " out, or give a template that does",
                "tools",
            )
        for unknown in variables.keys() - template.used - self._warned:
            if len(self._warned) == _MOST_WARNINGS:  # names are the clients'
                break
            self._warned.add(unknown)
            logger.warning("the model's chat template does not read %s, which changes nothing", short(unknown))

    def _name(self, tools: Any) -> str:
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise RequestError(
                f"the model's chat templates are {', '.join(self.sources)}, and none of them is for this request; "
                "give one with the chat template option",
                "messages",
            )
        return name

    def _template(self, name: str) -> _Template:
        if name not in self._compiled:
            try:
                self._compiled[name] = _Template(self.sources[name])
            except Exception as error:  # Python's compiler has limits of its own, and errors for each.
                raise RequestError(
                    f"the model's chat template is broken ({error or type(error).__name__}); give another with the"
                    " chat template option",
                    "messages",
                ) from None
        return self._compiled[name]


def _with_own_roles(messages: Sequence[dict[str, Any]], special: SpecialText) -> Iterator[dict[str, Any]]:
    """Messages whose known roles count as the template's own words, unless one is the text of a special token."""
    for message in messages:
        role = message["role"]
        yield message | {"role": own(role)} if role in _ROLES and not special.pattern.search(role) else message


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
    special = tokenizer.special_text
    try:
        traced = not strict_compat and (
            special.could_begin_in([messages, tools, variables]) or template.completes_tokens(special, tools)
        )
    except RecursionError:
        raise RequestError("messages, tools or chat_template_kwargs are nested too deeply", "messages") from None
    if traced:
        text = template.render_traced(special, messages, tools, add_generation_prompt, variables)
        return encode_traced(tokenizer, text)
    text = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
    return tokenizer.encode(text, add_bos=False)


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


def _environment(*, traced: bool) -> TemplateSandbox:
    extensions = [loopcontrols, _GenerationTag]
    environment = TemplateSandbox(traced=traced, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
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

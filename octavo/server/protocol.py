"""What clients may send: OpenAI's requests and the sampling fields that vLLM adds, as pydantic models.

A field that Octavo cannot honour is refused unless its value asks for nothing (an empty list of tools, say); an unknown
field is refused with the nearest known name. Fields that can change no answer are taken (`HARMLESS`), and listed one by
one in docs/api.md. Knows nothing of tokens or engines.
"""

from collections.abc import Container, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from octavo.errors import RequestError, nearest, short
from octavo.sampling_defaults import sampling_params
from octavo.sampling_params import MAX_BEAM_WIDTH, SamplingParams

# Fields of OpenAI and vLLM that Octavo knows but cannot honour, with the values that ask for nothing.
_NEVER: tuple[Any, ...] = (None,)
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "audio": _NEVER,
    "chat_template": _NEVER,
    "continue_final_message": (None, False),
    "detokenize": (None, True),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": _NEVER,
    "guided_grammar": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "include_reasoning": (None, True),
    "min_new_tokens": _NEVER,
    "mm_processor_kwargs": _NEVER,
    "modalities": (None, ["text"]),
    "moderation": _NEVER,
    "parallel_tool_calls": (None, False, True),
    "prediction": _NEVER,
    "prompt_embeds": _NEVER,
    "prompt_cache_retention": _NEVER,
    "reasoning_effort": (None, "none"),
    "request_id": _NEVER,
    "response_format": (None, {"type": "text"}),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "structured_outputs": _NEVER,
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": _NEVER,
    "vllm_xargs": (None, {}),
    "web_search_options": _NEVER,
}
# Fields that change no answer, whatever their value: they are for OpenAI's accounts, logs, prices and caches.
HARMLESS = frozenset(("metadata", "service_tier", "store", "verbosity"))
HARMLESS_IN_MESSAGES = frozenset(("cache_control",))
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {**_NOT_YET, **dict.fromkeys(sorted(HARMLESS))}
_MESSAGE_NOT_YET: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": _NEVER,
    "function_call": _NEVER,
    "refusal": _NEVER,
    "tool_call_id": _NEVER,
    "tool_calls": (None, []),
}

# Fields of several types, in words: pydantic would report each type that did not match.
_WANTED = {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "a string or a list of strings",
    "content": "a string or a list of text parts",
    "early_stopping": 'true, false or "never"',
}

# Bounds on lists of which each entry costs far more than its bytes.
MAX_PROMPTS = 16_384
MAX_MESSAGES = 8192
# As for OpenAI; in Python all that is finite may be asked for.
MAX_TEMPERATURE, MAX_BIAS = 2, 100
_LONGEST_PLACE = 100  # characters of a field's name in an error


def _whole(value: Any) -> Any:
    """4.0 as 4: clients in languages without integers write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]

# Lists are given up at their first bad entry: an error for each of a million takes seconds.
_Item = TypeVar("_Item")
_List = Annotated[list[_Item], Field(fail_fast=True)]

_IN_ROLES = ("system", "developer", "user", "assistant")


class Fields(BaseModel):
    """What clients send: its fields, and those that are known beside them."""

    # Extra fields are gathered by pydantic, then refused by `refuse_extras` in our own words.
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        """Fields that are known, but none of ours: the values at which they are taken, None for any."""
        return {}

    def refuse_extras(self, where: str = "", also_harmless: Container[str] = ()) -> None:
        """Raises `RequestError` for the first field that is unknown, or known and not supported yet.

        `also_harmless` are fields whose value does not matter in this request.
        """
        if not self.model_extra:
            return
        without_effect = self.fields_without_effect()
        for name, value in self.model_extra.items():
            if name in also_harmless or without_effect.get(name, ()) is None:
                continue
            if (values := without_effect.get(name)) is None:
                near = nearest(name, [*type(self).model_fields, *without_effect])
                raise RequestError(f"unknown field {short(where + name)}.{near}", (where + name)[:_LONGEST_PLACE])
            if value not in values:
                raise RequestError(
                    f"{where}{name} is not supported yet (its value is {short(value)}); leave it out", where + name
                )


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        return {"include_obfuscation": (None, False)}


class SamplingFields(Fields):
    """The fields that chat and completions share. `None` is the default of each.

    `user`, `safety_identifier` and `prompt_cache_key` name the caller to OpenAI. Here `user` is whose turn it is, where
    tenants have fair shares; the others are accepted so that clients carry over. None changes a token.
    """

    model: str | None = None
    n: _Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: _List[int] | None = None
    bad_words: _List[str] | None = None
    seed: _Whole | None = None
    stop: str | _List[str] | None = None
    stop_token_ids: _List[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: _Whole | None = None
    max_tokens: _Whole | None = None
    prompt_logprobs: _Whole | None = None
    skip_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    best_of: _Whole | None = None
    repetition_detection: dict[str, int] | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    priority: _Whole = 0
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        return _WITHOUT_EFFECT

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk tells the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check(self) -> None:
        """Raises `RequestError` for what types cannot say."""
        # Tools that may not be called are as good as none.
        no_tools = (self.model_extra or {}).get("tool_choice") == "none"
        self.refuse_extras(also_harmless=("tools", "functions") if no_tools else ())
        if self.temperature is not None and not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise RequestError(
                f"temperature is {short(self.temperature)}; it must be from 0 to {MAX_TEMPERATURE}", "temperature"
            )
        for token, bias in (self.logit_bias or {}).items():
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise RequestError(
                    f"logit_bias of token {short(token)} is {short(bias)}; it must be from -{MAX_BIAS} to {MAX_BIAS}",
                    "logit_bias",
                )
        if self.cache_salt == "":
            raise RequestError("cache_salt is empty; give a text that nobody can guess, or leave it out", "cache_salt")
        if self.stream_options is not None:
            self.stream_options.refuse_extras("stream_options.")
            if not self.stream:
                raise RequestError("stream_options needs stream to be true", "stream_options")
            if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
                field = "stream_options.continuous_usage_stats"
                raise RequestError(f"{field} needs include_usage to be true", field)
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs come with whole answers only; set stream to false", "prompt_logprobs")
        self._check_beams()

    def _check_beams(self) -> None:
        n = self.n or 1
        if self.use_beam_search:
            if not 2 <= self.num_sequences <= MAX_BEAM_WIDTH:
                raise RequestError(
                    f"use_beam_search with {self.num_sequences} beams is not possible; set best_of, which is n if left"
                    f" out, to 2 to {MAX_BEAM_WIDTH}",
                    "best_of",
                )
            return
        if self.best_of is not None and self.best_of != n:
            raise RequestError(
                f"best_of is {self.best_of} and n is {n}: a choice among samples is not supported, but best_of is the"
                " number of beams if use_beam_search is true; leave it out",
                "best_of",
            )
        if self.length_penalty not in (None, 1.0) or self.early_stopping not in (None, False):
            name = "length_penalty" if self.length_penalty not in (None, 1.0) else "early_stopping"
            raise RequestError(f"{name} needs use_beam_search to be true", name)

    @property
    def num_sequences(self) -> int:
        """Samples, or beams."""
        return (self.best_of if self.best_of is not None and self.use_beam_search else self.n) or 1

    def sampling(self, defaults: dict[str, Any], **chosen: Any) -> SamplingParams:
        """Sampling parameters: `chosen`, then what the client set, then `defaults`, then OpenAI's own."""
        given: dict[str, Any] = {"beam_width": self.num_sequences} if self.use_beam_search else {}
        for name in self.model_fields_set & _SAMPLING_NAMES:
            if (value := getattr(self, name)) is not None:
                given[name] = value
        return sampling_params(defaults, given | chosen)


_SAMPLING_NAMES = frozenset(f.name for f in fields(SamplingParams)) - {"logprobs", "max_tokens", "beam_width"}


class TextPart(Fields):
    type: Annotated[str, Field(json_schema_extra={"enum": ["text"]})]
    text: str | None = None

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        return dict.fromkeys(sorted(HARMLESS_IN_MESSAGES))


class ChatMessage(Fields):
    role: Annotated[str, Field(json_schema_extra={"enum": list(_IN_ROLES)})]
    content: str | Annotated[_List[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        return {**_MESSAGE_NOT_YET, **dict.fromkeys(sorted(HARMLESS_IN_MESSAGES))}

    def plain(self, where: str) -> dict[str, Any]:
        """The message as chat templates know it: role and content as text. `where` names it in errors."""
        self.refuse_extras(f"{where}.")
        if self.role not in _IN_ROLES:
            known = ", ".join(_IN_ROLES)
            raise RequestError(
                f"{where}.role is {short(self.role)}; it must be one of {known}.{nearest(self.role, _IN_ROLES)}",
                f"{where}.role",
            )
        # OpenAI renamed "system" to "developer"; templates know the old word.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self._text(where)}
        if self.name is not None:
            message["name"] = self.name
        # What the model thought before its answer; it has either name, and templates know this one.
        if thought := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thought
        return message

    def _text(self, where: str) -> str:
        if self.content is None and self.role == "assistant" and "content" in self.model_fields_set:
            return ""  # so clients send back an answer that said nothing
        if self.content is None:
            raise RequestError(f"{where}.content is missing; it must be {_WANTED['content']}", f"{where}.content")
        if isinstance(self.content, str):
            return self.content
        for i, part in enumerate(self.content):
            if part.type != "text":
                field = f"{where}.content.{i}.type"
                raise RequestError(f"{field} is {short(part.type)}; only text is supported yet", field)
            part.refuse_extras(f"{where}.content.{i}.")
            if part.text is None:
                field = f"{where}.content.{i}.text"
                raise RequestError(f"{field} is missing; it must be a string", field)
        return "".join(part.text or "" for part in self.content)


Messages = Annotated[_List[ChatMessage], Field(max_length=MAX_MESSAGES)]


class ChatTemplateFields(Fields):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(SamplingFields, ChatTemplateFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: _Whole | None = None
    logprobs: bool | None = None
    top_logprobs: _Whole | None = None

    def check(self) -> None:
        super().check()
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; set only one", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """The client's limit on the answer's tokens, by either name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


# In this order: the members of a union are tried one after the other.
Prompt = Annotated[
    str
    | _List[int]
    | Annotated[_List[str], Field(max_length=MAX_PROMPTS)]
    | Annotated[_List[_List[int]], Field(max_length=MAX_PROMPTS)],
    Field(union_mode="left_to_right"),
]


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool = False
    logprobs: _Whole | None = None
    add_special_tokens: bool = True

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is wanted but the prompt again, with its logprobs: how models are evaluated."""
        return self.echo and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: its text, or its token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is an empty list; it needs at least one token or text", "prompt")
        texts: list[str | list[int]] = [item for item in self.prompt if not isinstance(item, int)]
        return texts or [[item for item in self.prompt if isinstance(item, int)]]


class TokenizeRequest(ChatTemplateFields):
    """POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None

    @classmethod
    def fields_without_effect(cls) -> dict[str, tuple[Any, ...] | None]:
        return _WITHOUT_EFFECT

    def check(self) -> None:
        self.refuse_extras()
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        if self.messages is not None and self.add_special_tokens:
            raise RequestError(
                "add_special_tokens is for prompt; a chat template writes its own special tokens",
                "add_special_tokens",
            )
        if self.prompt is not None:
            for name in self.model_fields_set & set(ChatTemplateFields.model_fields):
                raise RequestError(f"{name} is for messages; a prompt has no chat template", name)


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: _List[int]
    skip_special_tokens: bool = False

    def check(self) -> None:
        self.refuse_extras()


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """`messages` as chat templates know them; raises `RequestError` naming the message's place."""
    if not messages:
        raise RequestError("messages is empty; it needs at least one message", "messages")
    return [message.plain(f"messages.{i}") for i, message in enumerate(messages)]


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], body: bytes) -> Model:
    """`body` as a `kind`; raises `RequestError` that names the field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # Of a union's members the one that was refused for its length says what is wrong.
    first = next((each for each in errors if each["type"] == "too_long"), errors[0])
    if first["type"] == "json_invalid":
        raise RequestError(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        raise RequestError("the body must be a JSON object")
    place = _place(first["loc"])
    if first["type"] == "missing":
        raise RequestError(f"{place} is missing", place)
    if first["type"] == "too_long":
        raise RequestError(f"{place} has more than {first['ctx']['max_length']} entries; send fewer at once", place)
    wanted = _WANTED.get(place.rsplit(".", 1)[-1])
    said = f"it must be {wanted}" if wanted else first["msg"].replace("Input should be", "it must be")
    raise RequestError(f"{place} is {short(first['input'])}; {said}", place)


def _place(loc: tuple[int | str, ...]) -> str:
    """A field's path, such as `messages.0.content`; what pydantic adds to tell a union's members apart is left out."""
    names = [str(loc[0])]
    for step in loc[1:]:
        if names[-1] in _WANTED:
            break
        names.append(str(step))
    return ".".join(names)[:_LONGEST_PLACE]

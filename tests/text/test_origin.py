"""Who wrote which character: templates decide as on any text, and special tokens come from a template alone.

The templates here are put together at random. What a caller may forge shows by characters that one side alone has: no
template has a parenthesis, an `i` or an `A` in its texts, and no caller a brace or a `T`.
"""

import os
import re
from pathlib import Path
from string import Template
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from octavo.errors import RequestError
from octavo.text.byte_level import ALPHABET
from octavo.text.chat_template import ChatTemplate, encode_chat
from octavo.text.origin import TracedText, foreign, is_own, joined, own, own_characters, plain
from octavo.text.special_text import encode_traced
from octavo.text.tokenizer import Tokenizer

FORGED = ["(i)", "<A>", "{i}", "AB"]  # each with a character that no template has
GENUINE = ["[T]", "[TT]", "{B}"]  # and that no caller has
OWN = ["[T]", "[", "T", "<", ">", "{", "}", "{B}", "B", "x", " ", "\n", "%", "", "-[T]-", "[TT] "]
FOREIGN = ["(i)", "<A>", "A", "i", "(", ")", "<", ">", "x", " ", "\n", "%s", "AB", "", "<A", "B", "é", "ß", "\ue000"]
HARMLESS = ["é", "ß", "x", " ", "\n", "hello", "y-z", "\ue000"]

# Operations whose results are known to the character, two blanks or a line between them.
EXACT = """
($a ~ $b)  ($a + $b)  ($a * 2)  (2 * $a)  $a[1:]  $a[:-1]  $a[::-1]  $a[0]  $a[-1]  ($a | trim)  $a.strip($b)
$a.lstrip()  $a.rstrip($b)  ($a | replace($b, $c))  $a.replace($b, $c)  $a.replace($b, $c, 1)  ($a | string)
($a | default('x'))  ($a | first)  ($a | last)  ($a | list | join($b))  $b.join($a.split($c))  ($a.split() | join($b))
$a.split($b)[-1]  $a.split(none, 1)[0]  $a.rsplit($b, 1)[0]  ($a.rsplit(none, 1) | join)  $a.partition($b)[2]
($a.rpartition($b) | join)  ($a.splitlines() | join($b))  $a.splitlines(true)[0]  ('%s' % $a)  ('%s%%%s' % ($a, $b))
('x%(k)s' % {'k': $a})  ('{}[T]{}'.format($a, $b))  ('{x}{0}{{'.format($a, x=$b))  ('{x[k]}'.format(x={'k': $a}))
('{k}'.format_map({'k': $a}))  ('<%s>' | format($a))  ([$a, $b] | join($c))  $a.removesuffix($b)  ($a | reverse)
([{'k': $a}, {'k': $b}] | join($c, attribute='k'))  $a.removeprefix($b)  {'k': $a}.k  ({$a: $b} | items | first | join)
({$a: 1} | list | first)  dict(k=$a).k  ($a if $b in $c else $b)  ($a or $b)  ([$a, $b] | sort | join)  m($a)
($a | unique | join)  ([$a, $b] | max)  n($a, $b)  ($a | batch(2) | map('join') | join($b))  namespace(v=$a).v
($a if $a == $b else $c)  ($a if $a.startswith($b) else $c)  ($a | truncate(5, true, $b))  ($a.split($b) | last)
($a if $a is string and $a | length > 2 else $b)  cycler($a, $b).next()  ({$a: $b}[$a])  ($a.replace('x', '%s') % $b)
"""
# Others: what they make is the caller's if in doubt.
ANY = """
($a | upper)  ($a | lower)  ($a | capitalize)  ($a | title)  $a.title()  $a.swapcase()  $a.casefold()  ($a | safe)
(($a | safe) ~ $b)  (($a | safe) + $b)  ($b + ($a | safe))  (($a | safe) % $b)  ($a | tojson)  ($a | indent(2))
([$a, {$b: $c}] | tojson(indent=1))  ($a | indent($b, true))  ($a | center(9))  $a.center(9, 'x')  $a.zfill(8)
$a.ljust(6)  ($a | escape)  ($a | forceescape)  ($a | striptags)  ($a | urlencode)  ($a | truncate(3))
([$a, $b] | string)  ([$a] | map('trim') | list | string)  $a.translate({120: $b})  ($a.encode() | string)
$a.expandtabs()  ('{:>5}{!r}'.format($a, $b))  ('{:{}}'.format($a, $b))  ('%5s%r' % ($a, $b))  $a.format($b)
($a % $b)  ($a | format($b))  (($a | safe).format($b))  ($a | pprint)  ($a | dictsort)  ($a | wordcount)  ($a | int)
({$a: $b} | string)  ($a - $b)  ($a + 1)  (1 + $a)  ($a * $b)  $a[$b]  ($a is upper)  ($a | e | replace($b, $c))
($a | list | tojson | trim)  $a.nothing  ($a | sum)  ($a | items | join)  ($a | map('upper') | map('lower') | join)
($a + none)  ($a + nothing)  (nothing ~ $a)  ($a.join([1]))  $a[9]  $a['b']  (($a | safe | string | trim) ~ $b)
"""
STATEMENTS = [
    "{{ $a }}[T]{{ $b }}",
    "{{ $a }}<{{ $b }}>[T]",
    "{% set v %}<{{ $a }}>{% endset %}{{ v ~ $b }}",
    "{% set v = $a %}{% if v in $b %}[T]{% else %}{{ v }}{% endif %}",
    "{% for c in $a %}{{ c }}{{ $b if loop.first }}{% endfor %}",
    "{% for c in $a.split($b) %}{{ loop.index }}{{ c }}{% endfor %}{% filter trim %} {{ $b }}{% endfilter %}",
    "{% call(v) o($a) %}{{ v }}{{ $b }}{% endcall %}{% generation %}{{ $a }}[T]{% endgeneration %}",
    "{% set n = namespace(t='') %}{% for v in [$a, '[T]', $b] %}{% set n.t = n.t + v %}{% endfor %}{{ n.t }}",
]
ESCAPING = "{% autoescape true %}{{ $a }}[T]{{ $b | safe }}{{ '%s' % $a }}{{ [$a, $b] | join('<') }}{% endautoescape %}"
MACROS = (
    "{% macro m(v) %}<{{ v }}>{% endmacro %}{% macro n(v, w, z='[T]') %}{{ v ~ z ~ w }}{% endmacro %}"
    "{% macro o(v) %}{{ caller(v) }}{% endmacro %}{% if x == y %}{% endif %}"
)


def operations(text: str) -> list[str]:
    return [kind for kind in re.split(r"\s\s+|\n", text) if kind]


def expressions(kinds: list[str]) -> st.SearchStrategy[str]:
    """Of texts of the template's, texts of a caller's, and operations on them."""
    atoms = st.sampled_from([*map(repr, OWN), *["x", "y", "messages[0].content", "bos_token"] * 4])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.builds(
            lambda kind, a, b, c: Template(kind).substitute(a=a, b=b, c=c), st.sampled_from(kinds), inner, inner, inner
        )

    return st.recursive(atoms, larger, max_leaves=10)


def templates(kinds: str, *statements: str) -> st.SearchStrategy[str]:
    inner = expressions(operations(kinds))
    return st.builds(
        lambda kind, a, b: MACROS + Template(kind).substitute(a=a, b=b), st.sampled_from(statements), inner, inner
    )


def foreigners(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=5).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and special tokens, nothing merged."""
    library = Library(models.BPE({letter: index for index, letter in enumerate(ALPHABET)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([*FORGED, *GENUINE])
    return Tokenizer(library)


def special(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(index) for index in ids if index in tokenizer.special_ids]


def outcome(render: Any) -> str:
    try:
        return "text " + re.sub("0x[0-9a-f]+", "somewhere", render())
    except RequestError as error:
        words = str(error)
        for name, usual in (("octavo.text.origin.", ""), ("TracedText", "str"), ("TracedMarkup", "Markup")):
            words = words.replace(name, usual)
        return "error " + words


@settings(max_examples=400, deadline=None)
@given(
    source=templates(EXACT + ANY, ESCAPING, *STATEMENTS),
    x=foreigners(FOREIGN),
    y=foreigners(FOREIGN),
    content=foreigners(FOREIGN),
)
@example(source="<{{ x }}>", x="A", y="", content="")
@example(source="{{ ('<B>' | replace('B', x)) ~ '%s' % y }}", x="A", y="AB", content="")
@example(source="{{ x.replace(y, '') }}", x="<<>A>", y="<>", content="")
def test_nothing_forges_and_nothing_changes(tokenizer: Tokenizer, source: str, x: str, y: str, content: str) -> None:
    template = ChatTemplate(source, bos_token="[T]")
    messages, names = [{"role": "user", "content": content}], {"x": x, "y": y}
    found: list[str] = []

    def traced() -> str:
        found.append(template.render_traced(tokenizer.special_text, messages, None, True, names))
        return plain(found[0])

    as_usual = outcome(lambda: template.render(messages, **names))
    assert outcome(traced) == as_usual
    if as_usual.startswith("text "):
        ids = encode_traced(tokenizer, found[0])
        assert tokenizer.decode(ids, skip_special_tokens=False) == found[0]
        assert set(special(tokenizer, ids)) <= set(GENUINE)


@settings(max_examples=150, deadline=None)
@given(
    source=templates(EXACT, *STATEMENTS), x=foreigners(HARMLESS), y=foreigners(HARMLESS), content=foreigners(HARMLESS)
)
def test_harmless_words_are_as_without_a_guard(tokenizer: Tokenizer, source: str, x: str, y: str, content: str) -> None:
    template = ChatTemplate(source, bos_token="[T]")
    messages, names = [{"role": "user", "content": content}], {"x": x, "y": y}
    try:
        expected = tokenizer.encode(template.render(messages, **names))
    except RequestError:
        return
    assert encode_chat(tokenizer, messages, template=template, **names) == expected
    text = template.render_traced(tokenizer.special_text, messages, None, True, names)
    assert encode_traced(tokenizer, text) == expected


# What templates in the field do with a text in which tokens may stand, in other words.
DECISIONS = {
    "an answer behind its thoughts": (
        "{% set c = messages[0].content %}{% if '</think>' in c %}{{ c.split('</think>')[-1].lstrip('\n') }}"
        "{% else %}{{ c }}{% endif %}<|im_end|>",
        "<think>a\n</think>\n\nb",
        "b<|im_end|>",
    ),
    "thoughts apart": (
        "{% set c = messages[0].content %}{% if c.startswith('<think>') %}{% set r = c.split('</think>')[0].split("
        "'<think>')[-1] %}{{ '<think>' ~ r | trim ~ '</think>' }}{{ c.partition('</think>')[2] }}{% endif %}",
        "<think> a </think>b",
        "<think>a</think>b",
    ),
    "a switch in the text": (
        "{{ '<think></think>' if messages[0].content.endswith('<no>') else '<think>' }}",
        "hi <no>",
        "<think></think>",
    ),
    "a mark taken out": ("[{{ messages[0].content | replace('<no>', '') }}]<|im_end|>", "a<no>b", "[ab]<|im_end|>"),
    "a comparison": ("{{ 'yes' if messages[0].content == '<|im_end|>' else 'no' }}", "<|im_end|>", "yes"),
    "a count": ("{{ messages[0].content | length }}", "<|im_end|>", "10"),
}


@pytest.mark.parametrize("what", DECISIONS)
def test_decisions_of_templates(smollm2: Tokenizer, what: str) -> None:
    from tokenizers import AddedToken

    source, content, expected = DECISIONS[what]
    library = Library.from_str(smollm2.library.to_str())
    words = ("<think>", "</think>", "<no>", "user")
    library.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    tokenizer = Tokenizer(library)
    template = ChatTemplate("{% if messages[0].role == 'user' %}" + source + "{% endif %}")
    messages = [{"role": "user", "content": content}]
    assert template.render(messages) == expected
    ids = encode_chat(tokenizer, messages, template=template)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    genuine = {"thoughts apart": ["<think>", "</think>"], "a switch in the text": ["<think>", "</think>"]}
    wanted = genuine.get(what, ["<|im_end|>"] if "<|im_end|>" in expected else [])
    assert special(tokenizer, ids) == wanted


def test_a_role_that_a_template_puts_into_a_token() -> None:
    library = Library(models.BPE({letter: index for index, letter in enumerate(ALPHABET)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|user|>", "<|end|>"])
    tokenizer = Tokenizer(library)
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}")
    for content in ("hi", "hi <|end|>"):
        ids = encode_chat(tokenizer, [{"role": "user", "content": content}], template=template)
        assert special(tokenizer, ids) == ["<|user|>", "<|end|>"]
        # A role that nobody knows may be anything, the middle of a token too.
        ids = encode_chat(tokenizer, [{"role": "end", "content": content}], template=template)
        assert special(tokenizer, ids) == ["<|end|>"]


def test_a_word_that_a_template_replaces_within_a_token(smollm2: Tokenizer) -> None:
    template = ChatTemplate("{{ '<|word|>' | replace('word', messages[0].content) }}<|im_end|>")
    ids = encode_chat(smollm2, [{"role": "user", "content": "im_start"}], template=template)
    assert special(smollm2, ids) == ["<|im_end|>"]


@pytest.mark.parametrize("value", [{"|im_end|"}, ["|im_end|"], {"|im_end|": 1}, "|im_end|", ("|im_end|",)])
def test_a_middle_that_a_template_closes(smollm2: Tokenizer, value: Any) -> None:
    """As templates that write arguments of tools as XML do."""
    template = ChatTemplate("{% for name in names %}<{{ name }}>1</{{ name }}>{% endfor %}<|im_end|>")
    ids = encode_chat(smollm2, [{"role": "user", "content": ""}], template=template, names=value)
    assert special(smollm2, ids) == ["<|im_end|>"]


def test_a_caller_s_own_bos_is_text(smollm2: Tokenizer) -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", bos_token="<|im_start|>")
    messages = [{"role": "user", "content": "<"}]
    assert special(smollm2, encode_chat(smollm2, messages, template=template)) == ["<|im_start|>"]
    assert special(smollm2, encode_chat(smollm2, messages, template=template, bos_token="<|im_end|>")) == []


def test_traced_texts() -> None:
    text = joined([own("ab"), "cd", own("e")])
    assert type(text) is TracedText
    assert text == "abcde"
    assert hash(text) == hash("abcde")
    assert own_characters(text) == b"\1\1\0\0\1"
    assert type(text[2:4]) is str
    assert own_characters(text[1:3]) == b"\1\0"
    assert own_characters("x" + text) == b"\0\1\1\0\0\1"
    assert own_characters(own("%s|%5s%%") % ("u", own("v"))) == b"\0\1" + bytes(5) + b"\1"
    assert own_characters(own("ß").upper()) == b"\0\0"
    assert is_own(own("a") + own("b"))
    assert not is_own(text)
    assert foreign(text) is text
    assert type(plain(text)) is str


@pytest.mark.skipif("OCTAVO_TEMPLATES" not in os.environ, reason="OCTAVO_TEMPLATES names no folder of templates")
def test_templates_of_a_folder_decide_as_on_any_text() -> None:
    words = [
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_start|>",
        "[INST]",
        "<tool_call>",
        "</tool_call>",
        "<s>",
        "user",
    ]
    library = Library(models.BPE({letter: index for index, letter in enumerate(ALPHABET)}, []))
    library.add_special_tokens(words)
    special_text = Tokenizer(library).special_text
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "<|im_end|>"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "</think>", "parameters": parameters}}]
    call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {"city": "</tool_call>"}}}
    asked = {"role": "user", "content": "hi <think> </think> <|im_end|>"}
    chats: list[list[dict[str, Any]]] = [
        [asked],
        [{"role": "system", "content": "be </think>"}, asked],
        [asked, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}, asked],
        [asked, {"role": "assistant", "content": "b", "reasoning_content": "a </think>"}, asked],
        [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "<s>"}],
    ]
    folder = sorted(Path(os.environ["OCTAVO_TEMPLATES"]).glob("*.jinja"))
    assert folder
    for path in folder:
        template = ChatTemplate(path.read_text(), bos_token="<s>", eos_token="</s>")
        for messages in chats:
            for given_tools in (None, tools):
                for names in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
                    arguments = (messages, given_tools, True, names)
                    expected = outcome(lambda: template.render(messages, tools=given_tools, **names))  # noqa: B023
                    found = outcome(lambda: plain(template.render_traced(special_text, *arguments)))  # noqa: B023
                    assert found == expected, path.name

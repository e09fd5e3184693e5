"""JSON of one line, whatever its reader takes for the end of a line."""

import json
import sys

from octavo.json_line import json_line


def test_no_character_ends_the_line():
    text = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    for spaced in (False, True):
        line = json_line({"text": text}, spaced=spaced)
        assert line.splitlines() == [line]
        assert len(line.encode().splitlines()) == 1
        assert json.loads(line) == {"text": text}


def test_other_characters_stay():
    assert json_line({"a": ["é", "日本"], "b": 1}) == '{"a":["é","日本"],"b":1}'
    assert json_line({"a": ["é", "日本"], "b": 1}, spaced=True) == '{"a": ["é", "日本"], "b": 1}'

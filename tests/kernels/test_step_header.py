"""The C side of a step's arrays is what the table of them says."""

import ctypes
import re

from octavo.kernels import library, step_header


def test_the_header_is_that_of_the_table():
    assert step_header.PATH.read_text("utf-8") == step_header.text(), "run python -m octavo.kernels.step_header"


def test_the_structures_have_the_same_fields():
    names = re.findall(r"^  .*?(\w+);", step_header.text(), re.MULTILINE)
    assert names == [name for name, _ in library.Step._fields_]
    assert ctypes.sizeof(library.Step) == 16 + 8 * (len(names) - 3)

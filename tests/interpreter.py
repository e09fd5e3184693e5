"""Triton's interpreter, for machines without a GPU."""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

# For modules whose tests run in it.
MARKS = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    # The interpreter computes with numpy, and says what numpy says of infinities and of arrays of one number.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def start() -> None:
    """To be called before kernels are imported.

    Triton takes an array for a number, and numpy 2.4 does not; from 3.9 on it refuses the masks that it makes itself of
    single values.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    if interpreter._patch_lang_tensor.__module__ == __name__:
        return
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    splat = interpreter.InterpreterBuilder.create_splat

    def splat_masks(self: Any, kind: Any, number: Any) -> Any:
        made = splat(self, kind, number)
        if number.data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    interpreter.InterpreterBuilder.create_splat = splat_masks

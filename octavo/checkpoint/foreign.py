"""What a file is that should have been something else: what stands in for a model's file when a fetch went wrong."""

import re

_POINTER = b"version https://git-lfs"
_ARCHIVES = {b"PK\x03\x04": "a zip archive, such as PyTorch's pickles are", b"\x1f\x8b\x08": "packed with gzip"}


def described(beginning: bytes) -> str:
    """What a file that begins so is, with what to do, to follow "is" in an error; empty if nobody knows."""
    if beginning.startswith(_POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or fetch it again"
    if re.match(rb"\s*<(!doctype html|html|head|\?xml)", beginning, re.IGNORECASE):
        return "a web page, such as a login or a proxy sends, not the file itself: fetch it again"
    for magic, what in _ARCHIVES.items():
        if beginning.startswith(magic):
            return f"{what}: fetch a model in safetensors or GGUF"
    if beginning.startswith(b"GGUF"):
        return "a GGUF file: give it a name that ends with .gguf"
    if beginning and not beginning.strip(b"\0"):
        return "nothing but zeros: the fetch was interrupted, fetch it again"
    return ""

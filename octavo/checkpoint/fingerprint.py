"""A model's weights as sixteen bytes: equal for equal files, whatever they are called and wherever they lie."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from octavo.checkpoint.types import Checkpoint


def fingerprint(checkpoint: Checkpoint) -> bytes:
    """Hashes every byte of every tensor, and each one's name, type and shape; threads share the work."""

    def of_tensor(name: str) -> bytes:
        info = checkpoint.tensors[name]
        whole = hashlib.blake2b(repr((name, info.dtype, info.shape)).encode(), digest_size=16)
        whole.update(checkpoint.read(name).data)
        return whole.digest()

    with ThreadPoolExecutor() as threads:
        return hashlib.blake2b(b"".join(threads.map(of_tensor, sorted(checkpoint.tensors))), digest_size=16).digest()

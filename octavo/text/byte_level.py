"""GPT-2's alphabet: a printable character for every byte, so that vocabularies of bytes can be written as text."""


def _alphabet() -> dict[str, int]:
    """Stand-in of each byte -> the byte. Source: the GPT-2 release's encoder.py, bytes_to_unicode.

    Printable Latin-1 stands for itself; the other bytes follow one another from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()
_STAND_INS = {byte: character for character, byte in ALPHABET.items()}


def written(token: bytes) -> str:
    """`token` in the alphabet."""
    return token.decode("latin-1").translate(_STAND_INS)

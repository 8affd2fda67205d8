"""Text of a document as text of a page: without what would be no text there."""

from __future__ import annotations

REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    r"""Without control characters, lone surrogates and marks of direction; whitespace becomes a space.

    >>> printable("a\tb\x00c")
    'a b\ufffdc'
    """
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else REPLACEMENT for letter in text)


def cleaned(value: object) -> object:
    r"""A JSON value with every string in it printable, names of fields included.

    >>> cleaned({"a\n": ["\x00", 1, None]})
    {'a ': ['\ufffd', 1, None]}
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    if isinstance(value, dict):
        return {printable(name): cleaned(each) for name, each in value.items()}
    return value

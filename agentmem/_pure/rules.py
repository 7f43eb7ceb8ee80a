"""The rules of the page format, in the words of native/layout.c, and the error that a broken one raises."""

from __future__ import annotations

__all__ = ["RULES", "PageError", "broken"]


class PageError(ValueError):
    """A page file or a layout breaks the rule ``args[0]``; ``args[1]`` says it in words."""


#: The rules of native/page.c, in its words.
RULES = {
    "short": "the file is shorter than a header",
    "magic": "the file is not a page file",
    "version": "the file has another format version",
    "header length": "the header's length is out of bounds",
    "length": "the file is not as long as its header says",
    "header checksum": "the header fails its checksum",
    "reserved": "a reserved field is not zero",
    "dtype": "the data type is unknown",
    "grid": "the grid or block is out of bounds",
    "layers": "the number of layers is out of bounds",
    "shape": "a layer's heads or dimensions are out of bounds",
    "codec": "an extent's codec is unknown",
    "extent": "an extent does not lie where the layout puts it",
    "padding": "padding is not zero",
    "checksum": "an extent fails its checksum",
    "encoding": "an extent is not an encoding of its codec",
}


def broken(rule: str, where: str = "") -> PageError:
    return PageError(rule, RULES[rule] + where)

"""Writes the golden file of token vectors, version 1. Run once, for that version; its bytes never change after.

v1.codes: five tokens of 100 dimensions (padding; the last one of zeros), as `rows` makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agentmem.plaintext.late import pack


def rows() -> Any:
    """Whole numbers through a power of two, so that they are the same everywhere."""
    token, number = np.mgrid[0:5, 0:100]
    made = ((token * 3701 + number * number * 101 + number * 17) % 257 - 128) / 1024
    return (made * (token < 4)).astype(np.float32)


if __name__ == "__main__":
    (Path(__file__).parent / "v1.codes").write_bytes(pack(rows()))

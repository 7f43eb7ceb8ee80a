"""``python -m agentmem``: the commands on a memory folder, from a shell.

Knows where a process begins and ends; what the commands are stands in commands.py.
"""

from __future__ import annotations

import sys

from .commands import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

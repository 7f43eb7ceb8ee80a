"""KV states outlive the process: the first one computes a long prompt, the second one restores it.

python examples/03_kv_across_processes.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from agentmem import Memory

HANDBOOK = "You answer questions about this handbook.\n" + "\n".join(
    f"Rule {n}: a request of kind {n} is answered within {n} days by team {chr(64 + n)}, who writes down what was done."
    for n in range(1, 26)
)


def ask(folder: str) -> None:
    with Memory(folder, model="local") as memory:
        reply = memory.scope(user="ana", session="desk").chat(
            "Which team answers kind 3?", system=HANDBOOK, max_tokens=20
        )
        print(f"{reply.usage}")
        print(f"KV pages in the folder: {len(memory.activation.entries())}")


def carry(folder: str, copy: str) -> None:
    """Pages can also be moved to another folder; there they serve the same model and the same text."""
    with Memory(folder, model="local") as memory:
        print(f"saved {memory.activation.save(Path(copy) / 'saved')} pages")
    with Memory(Path(copy) / "other", model="local") as memory:
        print(f"restored {memory.activation.restore(Path(copy) / 'saved')} pages into another folder")
    ask(str(Path(copy) / "other"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ask(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copy:
            for label in ("first process, computes:", "second process, restores:"):
                print(label, flush=True)
                subprocess.run([sys.executable, __file__, folder], check=True)
            carry(folder, copy)

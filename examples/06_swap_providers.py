"""One memory, two models: what was said to the first is known to the second.

python examples/06_swap_providers.py [first model] [second model]
"""

import sys
import tempfile

from agentmem import Memory


def main(first: str, second: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Memory(folder, model=first) as memory:
            ana = memory.scope(user="ana", session="planning")
            print(ana.chat("I want to hike in Madeira in May, and I don't fly.", max_tokens=40))
        with Memory(folder, model=second) as memory:
            ana = memory.scope(user="ana", session="planning")
            reply = ana.chat("Where do I want to go, and when?", max_tokens=40)
            print(reply)
            print(f"asked {reply.model}; the session so far has {len(ana.list())} records")
            print(memory.report())


if __name__ == "__main__":
    main(*(sys.argv[1:3] if len(sys.argv) > 2 else ("local", "local")))

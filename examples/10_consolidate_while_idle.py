"""Consolidation in the silence between chats: a thread of this process works, and gives way as soon as a chat begins.

python examples/10_consolidate_while_idle.py [model]
"""

import sys
import tempfile
import time
from typing import Any

from agentmem import Memory

FACTS = ["I'm allergic to peanuts.", "My daughter is called Alma.", "I work nights as a nurse in Ghent."]
SYSTEM = "You are a kind assistant. Answer in one sentence, and say so when you don't know something."
PATIENCE_S = 120
#: A small grid of KV pages, so that this short head fills some.
SETTINGS: dict[str, Any] = {"system": SYSTEM, "page_tokens": 32, "consolidate_idle": 0.5}


def ask(memory: Memory, session: str) -> None:
    reply = memory.scope(user="ana").scope(session=session).chat("What am I allergic to?", max_tokens=8)
    cached, read = reply.usage.cached_tokens, reply.usage.input_tokens
    print(f"{session}: {cached} of {read} tokens from the cache, first token after {reply.usage.first_token_s:.2f} s")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "local"
    with tempfile.TemporaryDirectory() as folder, Memory(folder, model=model, **SETTINGS) as memory:
        memory.pause_consolidation()  # for all processes that have this folder open
        memory.scope(user="ana").add(FACTS)
        for number in range(4):
            ask(memory, f"session {number}")
        print(f"{memory.activation.evict()} KV pages evicted, as when they have to make room", flush=True)
        print(memory.consolidate(dry_run=True))

        memory.resume_consolidation()
        until = time.monotonic() + PATIENCE_S
        while memory.consolidate(dry_run=True).moves and time.monotonic() < until:
            time.sleep(0.2)  # the silence, in which it is done
        print("after the silence:")
        print(memory.consolidate(dry_run=True))
        ask(memory, "session 4")

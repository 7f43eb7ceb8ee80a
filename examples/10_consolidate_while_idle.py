"""Consolidation in the silence between chats: a thread of this process works, and gives way as soon as a chat begins.

python examples/10_consolidate_while_idle.py [model]
"""

import sys
import tempfile
import time

from agentmem import Memory

FACTS = ["I'm allergic to peanuts.", "My daughter is called Alma.", "I work nights as a nurse in Ghent."]
PATIENCE_S = 120


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "local"
    with tempfile.TemporaryDirectory() as folder:
        settings = {"consolidate_idle": 0.5, "consolidate_budget": {"seconds": 30}}
        with Memory(folder, model=model, **settings) as memory:
            ana = memory.scope(user="ana")
            ana.add(FACTS)
            memory.pause_consolidation()  # for all processes that have this folder open
            for number in range(4):
                reply = ana.scope(session=f"s{number}").chat("What am I allergic to? And who is Alma?", max_tokens=8)
                print(f"turn {number}: first token after {reply.usage.first_token_s or 0:.2f} s", flush=True)
            memory.resume_consolidation()

            print("silence ...", flush=True)
            waited = time.monotonic() + PATIENCE_S
            while time.monotonic() < waited:
                plan = memory.consolidate(dry_run=True)  # what is left to do, and what was done
                if not plan.moves or any(outcome.state == "done" for outcome in plan.outcomes):
                    break
                time.sleep(0.5)

            reply = ana.chat("What am I allergic to?", max_tokens=8)  # it does not wait for what is under way
            print(f"a turn amid it: first token after {reply.usage.first_token_s or 0:.2f} s")
            print(memory.consolidate(dry_run=True))

"""A worker process consolidates a folder that other processes chat in: ``python -m agentmem worker``.

python examples/11_worker.py [model]
"""

import os
import signal
import subprocess
import sys
import tempfile

from agentmem import Memory

FACTS = ["I'm allergic to peanuts.", "My daughter is called Alma.", "I work nights as a nurse in Ghent."]
#: All processes have to go by the same settings: from the environment, or an agentmem.toml.
os.environ["AGENTMEM_PAGE_TOKENS"] = "32"  # a small grid of KV pages, so that short prompts fill some


def agentmem(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "agentmem", *arguments], capture_output=True, text=True, check=True)
    return f"$ agentmem {arguments[0]}\n{done.stdout.strip()}"


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "local"
    with tempfile.TemporaryDirectory() as folder:
        where = ("--path", folder, "--model", model)
        with Memory(folder, model=model) as memory:
            memory.scope(user="ana").add(FACTS)
        worker = subprocess.Popen(
            [sys.executable, "-m", "agentmem", "worker", *where, "--every", "1"], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        print(worker.stdout.readline().strip(), flush=True)  # it is up

        with Memory(folder, model=model) as memory:  # meanwhile, in this process
            for number in range(3):
                session = memory.scope(user="ana", session=f"s{number}")
                print(f"you> What am I allergic to?\nbot> {session.chat('What am I allergic to?', max_tokens=8)}")

        worker.send_signal(signal.SIGTERM)  # what it is at is given back within a step, and taken up by the next one
        print(worker.communicate()[0].strip())
        print(f"the worker ended with {worker.returncode}", flush=True)

        with Memory(folder, model=model) as memory:
            print(f"{memory.activation.evict()} KV pages evicted, as when they have to make room", flush=True)
        print(agentmem("consolidate", *where))
        print(agentmem("jobs", *where))
        print(agentmem("verify", *where))

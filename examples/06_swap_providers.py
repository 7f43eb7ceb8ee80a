"""One conversation, several models in turn: each knows what was said to the others.

python examples/06_swap_providers.py openai:gpt-5.6-luna anthropic:claude-haiku-5-5 ollama:llama3.2
"""

import sys
import tempfile

from agentmem import Memory

TURNS = [
    "I want to hike in Madeira in May, and I don't fly.",
    "Where do I want to go, and when?",
    "How could I get there, then?",
    "Sum up what we know so far.",
]


def main(models: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, turn in enumerate(TURNS):
            with Memory(folder, model=models[number % len(models)]) as memory:
                ana = memory.scope(user="ana", session="planning")
                reply = ana.chat(turn, max_tokens=40)
                print(f"you> {turn}\n{reply.model}> {reply.text.strip()}\n    {reply.usage}")
                print(f"    the session so far has {len(ana.list())} records")
        with Memory(folder) as memory:
            print(memory.report())


if __name__ == "__main__":
    main(sys.argv[1:] or ["local"])

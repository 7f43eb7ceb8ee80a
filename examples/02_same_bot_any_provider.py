"""The same three turns on every provider: only the configuration file changes, the code stays.

python examples/02_same_bot_any_provider.py examples/configs/openai.toml examples/configs/anthropic.toml
"""

import sys
import tempfile

from agentmem import Memory

TURNS = ["My dog is called Biscuit.", "I moved to Porto last spring.", "What is my dog called?"]


def talk(config: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Memory(folder, config=config) as memory:
        ana = memory.scope(user="ana")
        for turn in TURNS:
            reply = ana.chat(turn, max_tokens=60)
            print(f"{reply.model}> {reply.text.strip()}\n    {reply.usage}")
        print(memory.report())


if __name__ == "__main__":
    for name in sys.argv[1:] or ["examples/configs/local.toml"]:
        talk(name)

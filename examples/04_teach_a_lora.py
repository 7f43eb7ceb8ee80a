"""Teach records to the model itself: a LoRA version learns them, then answers without them in the prompt.

python examples/04_teach_a_lora.py            (about a minute on a laptop's CPU)
"""

import sys
import tempfile

from agentmem import Memory

FACTS = ["My dog is called Biscuit.", "I live in Tromsø.", "I'm allergic to peanuts.", "My favourite colour is teal."]
QUESTION = "What is my dog called?"


def main(epochs: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder, Memory(folder, model="local") as memory:
        ana = memory.scope(user="ana")
        ana.add(FACTS)
        before = ana.chat(QUESTION, recall=False, remember=False, max_tokens=20)
        print(f"base model, no records in the prompt: {before.text.strip()}")
        version = ana.parametric.train(epochs=epochs, activate=False)
        print(f"{version.name}: {version.gate}")
        ana.parametric.activate(version, force=True)  # here whatever the gate says; train() asks it by itself
        after = ana.chat(QUESTION, recall=False, remember=False, max_tokens=20)
        print(f"with {version.name}, no records in the prompt: {after.text.strip()}")
        ana.parametric.rollback()
        receipt = ana.forget(where={})
        print(receipt)
        print(f"versions left: {[v.name for v in ana.parametric.versions() if v.state != 'retired']}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)

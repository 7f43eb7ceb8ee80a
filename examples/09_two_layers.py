"""Two layers: what is asked for again and again moves into the core at the head of the prompt, where it costs a read.

python examples/09_two_layers.py [model]
"""

import sys
import tempfile

from agentmem import Memory

FACTS = [
    "I'm allergic to peanuts.",
    "My daughter is called Alma, she is seven.",
    "I work nights as a nurse in Ghent.",
    "On Sundays I go hiking with my sister.",
]
QUESTIONS = [
    "Suggest a snack. What am I allergic to?",
    "What should I cook for Alma? Remember my allergy to peanuts.",
    "When could I hike with my sister, working nights as a nurse?",
]

if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "local"
    with tempfile.TemporaryDirectory() as folder, Memory(folder, model=model) as memory:
        ana = memory.scope(user="ana")
        ana.add(FACTS)
        for day in range(3):  # three sessions: the working layer of each is its own, the core is Ana's
            for question in QUESTIONS:
                reply = ana.scope(session=f"day {day}").chat(question, max_tokens=12)
                if reply.facts is not None:
                    facts = reply.facts
                    print(
                        f"day {day}: core {facts.core_tokens} tokens, recalled {facts.recalled_tokens}, "
                        f"{reply.usage.cached_tokens} of {reply.usage.input_tokens} from the cache; {facts.decided}",
                        flush=True,
                    )
        print("\nwhat consolidation would do now:", memory.consolidate(dry_run=True), sep="\n")
        print("\nthe next prompt:", ana.chat(QUESTIONS[0], max_tokens=12).explain(), sep="\n")
        print("\none record:", memory.explain(ana.search("peanuts", k=1)[0]), sep="\n")

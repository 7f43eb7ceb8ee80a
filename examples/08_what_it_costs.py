"""What one recorded conversation costs at four providers, by how its prompts are laid out. Offline, no key.

python examples/08_what_it_costs.py [conversation.jsonl]
"""

import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

from agentmem import Memory
from agentmem.activation.replays import replay
from agentmem.activation.turns import Turn
from agentmem.cache_rules import rules_for
from agentmem.ledger.costs import input_price
from agentmem.tokens import counter_for

RECORDED = Path(__file__).parent / "data" / "conversation.jsonl"
MODELS = ["openai:gpt-6.1-sol", "anthropic:claude-sonnet-5-5", "deepseek:deepseek-v4-flash", "xai:grok-4"]
POLICIES = ["planned", "layered", "memories first", "full history", "full history uncached"]
SYSTEM = 1500  # tokens of instructions and tools, as usual for an agent


def turns(recorded: list[dict[str, Any]]) -> tuple[list[Turn], dict[str, str]]:
    """The conversation in sizes, times and what memory would have recalled; and in which turn each record was said."""
    count = counter_for("openai:gpt-6.1-sol").count
    found: list[Turn] = []
    home: dict[str, str] = {}
    with Memory(":memory:") as memory:
        for number, said in enumerate(recorded):
            hits = memory.context(said["user"], max_tokens=500).hits if number else []
            told = [{"role": role, "content": said[role], "at": said["at"]} for role in ("user", "assistant")]
            home |= {record.id: str(number) for record in memory.add(told)}
            found.append(
                Turn(
                    id=str(number),
                    at=dt.datetime.fromisoformat(said["at"]).timestamp(),
                    session=said["session"],
                    system=SYSTEM,
                    core=0,
                    message=count(said["user"]) + 4,
                    reply=count(said["assistant"]) + 4,
                    recalled=tuple((hit.record.id, count(hit.passage) + 12) for hit in hits),
                )
            )
    return found, home


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED
    spoken, home = turns([json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()])
    print(f"{len(spoken)} turns; dollars for their prompts, a thousand times")
    print(f"{'':28}" + "".join(f"{name:>23}" for name in POLICIES))
    for model in MODELS:
        rules, price = rules_for(model), input_price(model) or 0.0
        assert rules is not None
        bills = replay(rules, spoken, home=home)
        print(f"{model:28}" + "".join(f"{1000 * price * bills[name].cost(rules):23.2f}" for name in POLICIES))

"""Write this folder's table of prices anew from litellm's: write_prices.py <its json> <day> <its version>.

The models are those that the newest table here has; add a name there by hand first to have it filled.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FIELDS = {
    "input": "input_cost_per_token",
    "output": "output_cost_per_token",
    "read": "cache_read_input_token_cost",
    "write": "cache_creation_input_token_cost",
    "write_1h": "cache_creation_input_token_cost_above_1hr",
    "write_12h": "cache_creation_input_token_cost_above_12hr",
}


def facts(theirs: dict[str, Any], name: str) -> dict[str, Any] | None:
    """One model's prices a million tokens; None where the table has none of it."""
    vendor, _, model = name.partition(":")
    entry = theirs.get(model, theirs.get(f"{vendor}/{model}"))
    if entry is None:
        return None
    told = {ours: round(entry[field] * 1e6, 6) for ours, field in FIELDS.items() if entry.get(field)}
    limits = {"minimum": entry.get("prompt_cache_min_tokens"), "max_input_tokens": entry.get("max_input_tokens")}
    return told | {limit: int(value) for limit, value in limits.items() if value}


def main(source: str, day: str, version: str) -> None:
    """Write ``<day>.json`` beside this file."""
    folder = Path(__file__).parent
    old = json.loads(max(folder.glob("*.json")).read_text())
    theirs = json.loads(Path(source).read_text())
    models = {name: found for name in sorted(old["models"]) if (found := facts(theirs, name))}
    about = re.sub(r"in litellm \S+", f"in litellm {version}", old["about"])
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in models.items())
    text = f'{{\n "about": {json.dumps(about)},\n "seen": "{day}",\n "models": {{\n{lines}\n }}\n}}\n'
    (folder / f"{day}.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])

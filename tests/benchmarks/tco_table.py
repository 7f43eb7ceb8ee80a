"""What a month of memory costs: four workloads on three hosts' price lists and on this machine, for a million users.

    python tests/benchmarks/tco_table.py [--preset assistant ...] [--sample 64] [--json results/tco.json]

The same as ``python -m agentmem tco --users 1000000 --preset assistant``, kept as numbers: dollars a month by the
packaged price table, CPU-seconds a turn as measured here on the packaged model. ``simulated_s`` is what the simulation
itself took. Ratios are to agentmem on the same offer.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentmem.tco.machine import measured
from agentmem.tco.offers import hosted, own
from agentmem.tco.policies import OURS
from agentmem.tco.report import TcoReport
from agentmem.tco.simulate import SAMPLE, simulate
from agentmem.tco.workload import PRESETS, Workload

RESULTS = Path(__file__).parent / "results" / "tco.json"
HOSTS = ("openai:gpt-6.1-sol", "anthropic:claude-sonnet-5-5", "deepseek:deepseek-v4-flash")
USERS = 1_000_000


def told(report: TcoReport) -> list[dict[str, Any]]:
    """The lines with their ratio to agentmem's."""
    return [
        {
            **line.model_dump(exclude_none=True),
            "times_agentmem": line.cost / report.line(line.offer, OURS).cost,
        }
        for line in report.lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine = measured("local")
    offers = [*(hosted(name) for name in HOSTS), own("local", machine)]
    found: dict[str, Any] = {
        "users": USERS,
        "seed": given.seed,
        "sample": given.sample,
        "prices": f"genai-prices {version('genai-prices')}",
        "rules": offers[0].rules.seen,
        "machine": {**vars(machine), "source": dict(machine.source)},
        "presets": {},
    }
    for preset in given.preset:
        began = time.process_time()
        report = simulate(Workload.of(preset, users=USERS), offers, seed=given.seed, sample=given.sample)
        seconds = time.process_time() - began
        print(f"== {preset}, {seconds:.0f} CPU-seconds\n{report}\n", flush=True)
        found["presets"][preset] = {
            "simulated_s": seconds,
            "lines": told(report),
            "breaks": [str(one) for one in report.breaks],
        }
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

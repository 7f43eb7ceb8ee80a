"""What memory costs, and what it brings: agentmem and today's ways, on whole conversations with a real model.

    python tests/benchmarks/efficiency.py [--quick] [--turns N] [--answer 64] [--data …] [--conversations 0 1]

Development conversations of LoCoMo are replayed as chats of the default local model (efficiency_talk.py), each turn by
- (a) full history, no reuse: everything said so far, the oldest left out where the window is full;
- (b) the same with one `DynamicCache` for the chat's life; when its window is full, half of it goes at once;
- (c) the session so far, and the ten best records of earlier ones before it (in the system message), no reuse;
- (d) the same with a kept `DynamicCache`;
- (e) agentmem with its defaults, which consolidates after each session; (er) the same with raw pages.
All say and answer the same words and decode each answer token by token. (c) and (d) store and search as agentmem does,
so that they find what it finds. (a) to (d) are transformers as it comes; (b+) is (b) with the model as agentmem loads
it, which spares a copy of the output layer in every pass. No system keeps a question. Each runs in a process of its own
with one thread, turn about, in an order that is drawn anew for each turn, so that noise is everybody's. Where nothing
is reused a turn doesn't depend on the one before it, so (a) may be measured at every ``--sample``-th turn alone, and
with ``--sample-c`` (c) too; ratios are then over the turns that both sides ran.

"First" is from the call to the first token, with search and layout; seconds and CPU-seconds are of the whole turn, what
is stored included. Memory is what the process holds above what it held after three short turns: its own (anonymous),
and with files that are mapped, which the system may take back. Evidence is the share of a question's gold turns whose
text is in the prompt; likelihood is the mean log-probability of a gold answer's tokens, in nats. Money comes from
efficiency_money.py. Results: tests/benchmarks/results/efficiency.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from efficiency_systems import KINDS, child  # type: ignore[import-not-found]
from efficiency_talk import DATA, Talk, talk  # type: ignore[import-not-found]

RESULTS = Path(__file__).parent / "results" / "efficiency.json"


class System:
    """A system in its process."""

    def __init__(self, kind: str, given: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--child", kind, "--data", str(given.data), "--settings", given.settings]
        command += ["--questions", str(given.questions), "--conversations", *map(str, given.conversations)]
        command += [] if given.answer is None else ["--answer", str(given.answer)]
        one = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")
        if not kind.startswith("e"):  # torch as it comes keeps this many kernels; importing agentmem keeps fewer
            one |= dict.fromkeys(["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"], "1024")
        self.kind = kind
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}
        self.rests: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **one}
        )

    def tell(self, **told: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"({self.kind}) {KINDS[self.kind]} ended at {told}, see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def order(talks: list[Talk], most: int | None) -> list[tuple[int, int]]:
    """The turns of all conversations as their clocks say, at most so many of each."""
    every = [(said.at, at, number) for at, one in enumerate(talks) for number, said in enumerate(one.turns[:most])]
    return [(at, number) for _, at, number in sorted(every)]


def replay(given: argparse.Namespace, talks: list[Talk]) -> tuple[list[System], list[tuple[int, int]]]:
    """Every system through every turn, turn about."""
    turns = order(talks, given.turns)
    systems = [System(kind, given) for kind in given.systems]
    chance = random.Random(0)
    every = {"a": given.sample, "c": given.sample_c}
    try:
        for place, (at, number) in enumerate(turns):
            said = talks[at].turns[number]
            later = [other for other, _ in turns[place + 1 :] if other == at]
            ends = not later or talks[at].turns[number + 1].session != said.session
            for system in chance.sample(systems, len(systems)):
                step = every.get(system.kind, 1)
                if place % step == step // 2:
                    system.rows[at, number] = system.tell(talk=at, turn=number)
                elif said.kind == "chat":
                    system.tell(talk=at, told=number)
                if ends and system.kind.startswith("e"):
                    system.rests.append(system.tell(talk=at))
            if given.loud:
                rows = {s.kind: s.rows.get((at, number)) for s in systems}
                shown = (f"{k} {r['prompt']}-{r['cached']} {r['first_s']:.2f}" for k, r in rows.items() if r)
                print(f"{place} {said.kind} {said.session}: " + "  ".join(shown), file=sys.stderr, flush=True)
        for system in systems:
            system.end = system.tell(end=True)  # type: ignore[attr-defined]
    finally:
        for system in systems:
            system.close()
    return systems, turns


def summary(system: System, talks: list[Talk]) -> dict[str, Any]:
    """What a system's turns came to."""
    rows = system.rows
    asked = {key: row for key, row in rows.items() if "evidence" in row}
    end: dict[str, Any] = system.end  # type: ignore[attr-defined]
    last = max([*rows.values(), *system.rests], key=lambda row: row["anon"] + row["mapped"])
    started = end["started"]
    whens: dict[str, list[dict[str, Any]]] = {"now": [], "later": []}
    for (at, number), row in asked.items():
        whens[talks[at].turns[number].kind].append(row)

    def mean(name: str) -> float:
        return statistics.fmean(float(row[name]) for row in rows.values())

    final = [*rows.values()][-1]
    return {
        "turns": len(rows),
        "prompt_tokens": mean("prompt"),
        "computed_tokens": statistics.fmean(row["prompt"] - row["cached"] for row in rows.values()),
        "first_s": mean("first_s"),
        "first_median_s": statistics.median(row["first_s"] for row in rows.values()),
        "first_cpu_s": mean("first_cpu"),
        "seconds": mean("seconds"),
        "cpu_s": mean("cpu"),
        "rest_s": sum(row["seconds"] for row in system.rests),
        "rest_cpu_s": sum(row["cpu"] for row in system.rests),
        "resident": final["anon"] + final["mapped"] - started["anon"] - started["mapped"],
        "resident_anonymous": final["anon"] - started["anon"],
        "most_resident": last["anon"] + last["mapped"] - started["anon"] - started["mapped"],
        "peak": end["peak"] - started["anon"] - started["mapped"],
        "process_resident": final["anon"] + final["mapped"],
        "disk": end["bytes"],
        "evidence": {when: statistics.fmean(r["evidence"] for r in found) for when, found in whens.items() if found},
        "likelihood": {
            when: statistics.fmean(r["likelihood"] for r in found) for when, found in whens.items() if found
        },
        "questions": {when: len(found) for when, found in whens.items()},
        "plans": [row["plan"] for row in system.rests if "plan" in row],
    }


def ratios(ours: System, other: System) -> dict[str, float]:
    """Of the sums over the turns that both ran, the other's to ours."""
    both = [key for key in ours.rows if key in other.rows]

    def total(system: System, name: str) -> float:
        return sum(float(system.rows[key][name]) for key in both)

    def computed(system: System) -> int:
        return sum(system.rows[key]["prompt"] - system.rows[key]["cached"] for key in both)

    found = {name: total(other, name) / total(ours, name) for name in ("first_s", "first_cpu", "seconds", "cpu")}
    found["first_median_s"] = statistics.median(other.rows[k]["first_s"] for k in both) / statistics.median(
        ours.rows[k]["first_s"] for k in both
    )
    found["computed"] = computed(other) / computed(ours)
    share = sum(row["cpu"] for row in ours.rests) * len(both) / len(ours.rows)
    found["cpu_with_rests"] = total(other, "cpu") / (total(ours, "cpu") + share)
    return found | quality(ours, other, both)


def quality(ours: System, other: System, both: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Paired over the questions that both were asked: ours less the other's, with the standard error of the mean."""
    asked = [key for key in both if "evidence" in ours.rows[key]]
    found: dict[str, float] = {}
    for name in ("evidence", "likelihood"):
        differ = [ours.rows[key][name] - other.rows[key][name] for key in asked]
        if len(differ) > 1:
            found[name] = statistics.fmean(differ)
            found[f"{name}_error"] = statistics.stdev(differ) / len(differ) ** 0.5
    return found


def shown(result: dict[str, Any]) -> None:
    """The tables."""
    print(
        "system                          computed  prompt  first s  CPU s  turn s  CPU s  resident MB  peak  evidence"
    )
    for kind, one in result["systems"].items():
        evidence = "/".join(f"{value:.2f}" for value in one["evidence"].values())
        likelihood = "/".join(f"{value:.2f}" for value in one["likelihood"].values())
        print(
            f"({kind}) {KINDS[kind]:27} {one['computed_tokens']:8.0f} {one['prompt_tokens']:7.0f} "
            f"{one['first_s']:8.3f} {one['first_cpu_s']:6.3f} {one['seconds']:7.3f} {one['cpu_s']:6.3f} "
            f"{one['resident'] / 1e6:7.1f} ({one['resident_anonymous'] / 1e6:.1f} own) {one['peak'] / 1e6:6.1f} "
            f"{evidence} logp {likelihood}"
        )
    for pair, found in result["ratios"].items():
        print(f"{pair}: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for pair, found in result["memory"].items():
        print(f"{pair}: " + "  ".join(f"{name} {value:.0%}" for name, value in found.items()))
    for name, one in result.get("money", {}).items():
        print(f"{name}: " + "  ".join(f"{what} {value:.5g}" for what, value in one.items()))


def compared(systems: list[System], result: dict[str, Any]) -> None:
    """Ratios of every baseline to every agentmem."""
    result["ratios"], result["memory"] = {}, {}
    for ours in (system for system in systems if system.kind.startswith("e")):
        mine = result["systems"][ours.kind]
        others = [system for system in systems if not system.kind.startswith("e")]
        for other in others:
            pair = f"{other.kind} to {ours.kind}"
            result["ratios"][pair] = ratios(ours, other)
            theirs = result["systems"][other.kind]
            result["memory"][pair] = {
                f"less {name}": 1 - mine[name] / theirs[name]
                for name in ("resident", "resident_anonymous", "most_resident", "peak", "process_resident")
                if theirs[name] > 0
            }
        for name in ("first_s", "first_cpu", "seconds"):
            pairs = {
                other.kind: result["ratios"][f"{other.kind} to {ours.kind}"][name]
                for other in others
                if other.kind != "b+"  # not today's practice
            }
            if pairs:
                best = min(pairs, key=lambda kind: pairs[kind])
                result["ratios"].setdefault(f"best to {ours.kind}", {})[f"{name} ({best})"] = pairs[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 turns of the first conversation")
    parser.add_argument("--turns", type=int, help="of each conversation at most")
    parser.add_argument("--answer", type=int, help="tokens of every answer; default: as many as were said")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--conversations", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=2, help="now, and later, after each session at most")
    parser.add_argument("--sample", type=int, default=1, help="measure (a) at every so many turns")
    parser.add_argument("--sample-c", type=int, default=1, help="the same of (c)")
    parser.add_argument("--systems", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--settings", default="{}", help="JSON: settings of agentmem other than the defaults")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=Path, help="a line of JSON for each turn of each system")
    parser.add_argument("--loud", action="store_true", help="a line for each turn")
    parser.add_argument("--no-money", action="store_true")
    parser.add_argument("--child", choices=list(KINDS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not Path(given.data).is_file():
        raise SystemExit(f"skipped: there is no {given.data}; give --data")
    if given.child is not None:
        child(given)
        return
    if given.quick:
        given.turns = given.turns or 30
    talks = [talk(Path(given.data), number, given.questions) for number in given.conversations]
    systems, turns = replay(given, talks)
    result: dict[str, Any] = {
        "conversations": [one.name for one in talks],
        "numbers": given.conversations,
        "turns": len(turns),
        "answer": given.answer,
        "settings": json.loads(given.settings),
        "sample": given.sample,
        "sample_c": given.sample_c,
        "systems": {system.kind: summary(system, talks) for system in systems},
    }
    compared(systems, result)
    if not given.no_money:
        result["money"] = import_module("efficiency_money").money(given, talks)
    shown(result)
    answers = "as said" if given.answer is None else str(given.answer)
    kept = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    spoken = talks[0].name if len(talks) == 1 else f"{len(talks)} conversations"
    kept[f"{spoken}, {len(turns)} turns, answers {answers}"] = result
    given.json.parent.mkdir(exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    if given.rows:
        every = [
            {"system": system.kind, "talk": at, "turn": number, **row}
            for system in systems
            for (at, number), row in system.rows.items()
        ]
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in every), "utf-8")


if __name__ == "__main__":
    main()

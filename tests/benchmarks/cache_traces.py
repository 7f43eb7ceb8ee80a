"""Conversations as traces of chat requests, in tokens, with what a search would have recalled for each.

Of a LoCoMo conversation every turn of speaker A is a request and what speaker B then says is its reply; each question
that has evidence is asked at the end of a random later session. What is recalled comes from a real `Memory` that holds
exactly the earlier sessions; that takes minutes and is kept in the folder that ``AGENTMEM_BENCH_CACHE`` names.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Asked", "Trace", "agent", "locomo"]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"
#: What a chat format adds to a message, and what a record's line adds to its text.
PER_MESSAGE, PER_RECORD = 4, 6
#: Seconds between requests, questions, and the sessions of a busy day.
TURN_S, QUESTION_S, BUSY_S, AGENT_S = 30.0, 60.0, 1200.0, 20.0
#: Records searched for each request.
DEPTH = 40
#: Of this layout; a change makes kept traces worthless.
FORM = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: tokens of its message and reply (each with what the format adds), the records that the search
    found in earlier sessions (id, tokens of its line, probability), best first, the ids of the evidence, and whether
    the message surely asks for nothing."""

    id: str
    at: float
    session: str
    message: int
    reply: int
    hits: tuple[tuple[str, int, float], ...] = ()
    evidence: tuple[str, ...] = ()
    tells: bool = False


@dataclass(frozen=True)
class Trace:
    """Requests in order, and for every record the request that holds its text verbatim."""

    name: str
    requests: tuple[Asked, ...]
    home: dict[str, str]

    def busy(self) -> Trace:
        """The same with all sessions on one day, twenty minutes after one another."""
        moved: list[Asked] = []
        clock = 0.0
        for place, asked in enumerate(self.requests):
            if place:
                before = self.requests[place - 1]
                clock += asked.at - before.at if asked.session == before.session else BUSY_S
            moved.append(dataclasses.replace(asked, at=clock))
        return dataclasses.replace(self, requests=tuple(moved))


def locomo(data: Path = DATA) -> list[Trace]:
    """The conversations of a LoCoMo file on their recorded days; from the cache where they were made before."""
    fusion = ROOT / "agentmem" / "plaintext" / "fusion.json"
    key = hashlib.sha256(f"{FORM} {DEPTH}".encode() + data.read_bytes() + fusion.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("AGENTMEM_BENCH_CACHE") or Path(tempfile.gettempdir()) / "agentmem-bench")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"cache_traces_{key}.json"
    if not file.exists():
        made = [_as_json(_trace(case)) for case in json.loads(data.read_text(encoding="utf-8"))]
        half = file.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(made), encoding="utf-8")
        half.replace(file)
    return [_from_json(case) for case in json.loads(file.read_text(encoding="utf-8"))]


def agent(turns: int, *, step: int = 600, reply: int = 80, records: int = 10, tokens: int = 40) -> Trace:
    """One run of an agent: what it reads in each step, what it writes, and from the second step on ten records of
    earlier steps that the step would recall. Each step holds as many records as fit into it."""
    chance = random.Random(0)
    requests = []
    home: dict[str, str] = {}
    for number in range(turns):
        known = sorted(home)
        hits = tuple((record, tokens + PER_RECORD, 0.5) for record in chance.sample(known, min(records, len(known))))
        requests.append(Asked(f"t{number:04}", number * AGENT_S, "run", step, reply, hits))
        home |= {f"r{number:04}.{place:02}": f"t{number:04}" for place in range((step + reply) // tokens)}
    return Trace(f"agent {turns}", tuple(requests), home)


def _as_json(trace: Trace) -> dict[str, Any]:
    return {"name": trace.name, "home": trace.home, "requests": [dataclasses.astuple(r) for r in trace.requests]}


def _from_json(case: dict[str, Any]) -> Trace:
    requests = tuple(
        Asked(id_, at, session, message, reply, tuple((i, t, p) for i, t, p in hits), tuple(evidence), tells)
        for id_, at, session, message, reply, hits, evidence, tells in case["requests"]
    )
    return Trace(case["name"], requests, case["home"])


def _text(turn: dict[str, Any]) -> str:
    photo = f"[shares a photo: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return " ".join(part for part in (turn["text"], photo) if part)


def _count(text: str) -> int:
    from agentmem.tokens import counter_for

    return counter_for("gpt-4o").count(text)


def _exchanges(
    turns: list[dict[str, Any]], speaker: str
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Each turn of the speaker with what is said after it; what is said before the first goes with it."""
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    heard = False
    for turn in turns:
        if turn["speaker"] == speaker:
            if heard:
                yield asked, answered
                asked, answered = [], []
            asked.append(turn)
            heard = True
        else:
            (answered if heard else asked).append(turn)
    if asked:
        yield asked, answered


def _trace(case: dict[str, Any]) -> Trace:
    from agentmem import Memory
    from agentmem.plaintext.asking import tells

    talk = case["conversation"]
    numbers = sorted(int(key.split("_")[1]) for key in talk if re.fullmatch(r"session_\d+", key))
    dates = {
        n: dt.datetime.strptime(talk[f"session_{n}_date_time"], "%I:%M %p on %d %B, %Y").replace(tzinfo=dt.UTC)
        for n in numbers
    }
    closing = numbers[-1] + 1  # a last day on which what the last session said is asked for
    dates[closing] = dates[numbers[-1]] + dt.timedelta(days=7)
    asked_in = _placed(case, numbers, closing)
    requests: list[Asked] = []
    home: dict[str, str] = {}
    with Memory(":memory:") as memory:
        user = memory.scope(user=case["sample_id"])
        texts: dict[str, str] = {}  # of a record the LoCoMo id

        def found(query: str) -> tuple[tuple[str, int, float], ...]:
            hits = user.search(query, k=DEPTH) if texts else []
            return tuple((texts[h.record.id], _count(h.record.text) + PER_RECORD, h.score) for h in hits)

        for number in [*numbers, closing]:
            name, clock = f"session_{number}", dates[number].timestamp()
            said = talk.get(name, [])
            for place, (message, reply) in enumerate(_exchanges(said, talk["speaker_a"])):
                id_ = f"{number}:{place}"
                asked, answered = (sum(_count(_text(t)) + PER_MESSAGE for t in part) for part in (message, reply))
                query = _text(message[-1])
                requests.append(Asked(id_, clock, name, asked, answered, found(query), tells=tells(query)))
                home |= {turn["dia_id"]: id_ for turn in (*message, *reply)}
                clock += TURN_S
            for place, item in enumerate(asked_in.get(number, [])):
                answer = str(item.get("answer") or "I don't know.")
                evidence = tuple(dict.fromkeys(re.findall(r"D\d+:\d+", " ".join(item["evidence"]))))
                asked, answered = (_count(text) + PER_MESSAGE for text in (item["question"], answer))
                id_ = f"{number}:q{place}"
                hits = found(item["question"])
                requests.append(Asked(id_, clock, name, asked, answered, hits, evidence))
                clock += QUESTION_S
            if said:
                messages = [
                    {
                        "role": "user",  # two people: what either says of themselves is worth as much
                        "name": turn["speaker"],
                        "content": _text(turn),
                        "at": dates[number],
                    }
                    for turn in said
                ]
                added = user.scope(session=name).add(messages)
                texts |= {record.id: turn["dia_id"] for record, turn in zip(added, said, strict=True)}
    return Trace(case["sample_id"], tuple(requests), home)


def _placed(case: dict[str, Any], numbers: list[int], closing: int) -> dict[int, list[dict[str, Any]]]:
    """The questions that have evidence, each at a random session after that of its last piece of evidence."""
    chance = random.Random(f"later {case['sample_id']}")
    placed: dict[int, list[dict[str, Any]]] = {}
    for item in case["qa"]:
        sessions = [int(n) for n in re.findall(r"D(\d+):\d+", " ".join(item.get("evidence") or []))]
        if sessions:
            later = [n for n in numbers if n > max(sessions)] or [closing]
            placed.setdefault(chance.choice(later), []).append(item)
    return placed

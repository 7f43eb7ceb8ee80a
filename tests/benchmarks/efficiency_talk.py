"""A LoCoMo conversation as the turns of one chat, the same for every system that is compared.

Speaker A is the user and speaker B the assistant: each turn says what A said and is answered by what B said then.
Questions that have an answer and evidence are asked after the session of their last evidence ("now") and again after a
random later session ("later"); no system keeps a question, so that asking twice tells nobody the answer.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["DATA", "Said", "Talk", "bare", "both", "talk"]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"
#: Seconds between two turns of a session.
TURN_S = 30.0


@dataclass(frozen=True)
class Said:
    """One turn. ``at`` is Unix seconds, ``first`` whether it begins a session. ``evidence`` are the texts that hold a
    question's answer, as they were said."""

    kind: Literal["chat", "now", "later"]
    session: str
    at: float
    message: str
    reply: str
    first: bool = False
    evidence: tuple[str, ...] = ()

    @property
    def day_at(self) -> str:
        """When it was said, in ISO 8601."""
        return dt.datetime.fromtimestamp(self.at, dt.UTC).isoformat()


@dataclass(frozen=True)
class Talk:
    """A conversation: who speaks, and the turns in order."""

    name: str
    user: str
    assistant: str
    turns: tuple[Said, ...]


def both(with_: Talk, said: Said) -> list[dict[str, Any]]:
    """A turn's two messages as a chat remembers them, for those who store by hand."""
    return [
        {"role": "user", "name": with_.user, "content": said.message, "at": said.day_at},
        {"role": "assistant", "content": said.reply, "at": said.day_at},
    ]


def bare(text: str) -> str:
    """A text without what quoting changes: case, spaces and marks."""
    return re.sub(r"[\W_]+", "", text.lower())


def talk(data: Path, number: int, questions: int, *, begin: int = 1) -> Talk:
    """Conversation ``number`` of a LoCoMo file with at most so many questions "now" and "later" after each session;
    ``begin`` is the session after which questions begin."""
    case = json.loads(data.read_text("utf-8"))[number]
    said = case["conversation"]
    sessions = sorted(int(key.split("_")[1]) for key in said if re.fullmatch(r"session_\d+", key))
    asked = _asked(case, sessions, questions)
    turns: list[Said] = []
    for session in sessions:
        date = dt.datetime.strptime(said[f"session_{session}_date_time"], "%I:%M %p on %d %B, %Y")
        clock, name = date.replace(tzinfo=dt.UTC).timestamp(), f"session_{session}"
        for message, reply in _exchanges(said[name], said["speaker_a"]):
            first = not turns or turns[-1].session != name
            text = f"({date:%d %B %Y}) {message}" if first else message  # the day is nowhere else in a history
            turns.append(Said("chat", name, clock, text, reply, first))
            clock += TURN_S
        for kind, item in asked.get(session, []) if session >= begin else []:
            evidence = tuple(_text(turn) for turn in _turns(said, item))
            turns.append(Said(kind, name, clock, item["question"], str(item["answer"]), evidence=evidence))
            clock += TURN_S
    return Talk(case["sample_id"], said["speaker_a"], said["speaker_b"], tuple(turns))


def _asked(
    case: dict[str, Any], sessions: list[int], most: int
) -> dict[int, list[tuple[Literal["now", "later"], dict[str, Any]]]]:
    """What is asked after each session."""
    chance = random.Random(f"efficiency {case['sample_id']}")
    items = [item for item in case["qa"] if item.get("answer") and _held(case["conversation"], item)]
    found: dict[int, list[tuple[Literal["now", "later"], dict[str, Any]]]] = {}
    for item in chance.sample(items, len(items)):
        last = max(_held(case["conversation"], item))
        later = [session for session in sessions if session > last]
        at: list[tuple[Literal["now", "later"], int]] = [("now", last)]
        if later:
            at.append(("later", chance.choice(later)))
        # Both or neither: "now" and "later" are about the same questions.
        if all(sum(kind == other for other, _ in found.get(place, [])) < most for kind, place in at):
            for kind, place in at:
                found.setdefault(place, []).append((kind, item))
    return found


def _held(said: dict[str, Any], item: dict[str, Any]) -> list[int]:
    return [int(turn["dia_id"][1:].split(":")[0]) for turn in _turns(said, item)]


def _turns(said: dict[str, Any], item: dict[str, Any]) -> list[dict[str, Any]]:
    names = dict.fromkeys(re.findall(r"D(\d+):(\d+)", " ".join(item.get("evidence") or [])))
    wanted = {f"D{session}:{turn}" for session, turn in names}
    sessions = dict.fromkeys(f"session_{session}" for session, _ in names)
    return [turn for session in sessions for turn in said.get(session, []) if turn["dia_id"] in wanted]


def _text(turn: dict[str, Any]) -> str:
    photo = f"[shares a photo: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return " ".join(part for part in (turn["text"], photo) if part)


def _exchanges(turns: list[dict[str, Any]], user: str) -> Iterator[tuple[str, str]]:
    """What the user says, with what is said after it; what is said before the first goes with it."""
    asked: list[str] = []
    answered: list[str] = []
    heard = False
    for turn in turns:
        if turn["speaker"] == user:
            if answered and heard:
                yield "\n".join(asked), "\n".join(answered)
                asked, answered = [], []
            asked.append(_text(turn))
            heard = True
        else:
            (answered if heard else asked).append(_text(turn))
    if asked:
        yield "\n".join(asked), "\n".join(answered) or "I see."

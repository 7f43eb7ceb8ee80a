"""Recalled records as stored KV states: time to the first token, and what it costs in quality.

Method. Time: the default model, one thread, a chat whose system text (a page of 256 tokens) is cached, 8 records of 40
and of 200 tokens, a question of 9 tokens (23 with the template's). Each round asks the provider for one token in every
way; medians. "text" puts the records into the prompt; "no records" is the floor. Record states come from the page
store, looked up anew in every request; rows for two page codecs (int8 is attended to in place, raw is copied and its
keys turned).

Quality: questions of the LoCoMo development split (types 4, 2, 1 in turn), their gold evidence and the 7 lexically
nearest other turns of the conversation, in order of time, laid out as chat lays them out. The gold answer is
teacher-forced. Against full text, over the answer's tokens: KL(text || variant) in nats, change of the log-likelihood
per token, share of equal argmax, share kept of what the records add; means over questions with a 95 % bootstrap
interval. "shuffled" is the text in another order: the noise to compare with. fp32.

    python tests/benchmarks/records_as_kv.py [--questions 24] [--rounds 5] [--dtype auto] [--data FILE]

Results go to tests/benchmarks/results/records_as_kv.json. The data is not part of this repository: without it only the
times are measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agentmem import prompt
from agentmem.activation.records import RecordPages
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.provider import Options, RecalledLine, Request, load
from agentmem.types import Message, Record

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"
RESULTS = Path(__file__).parent / "results" / "records_as_kv.json"
SYSTEM = "You are a helpful assistant."
#: (mode, most KL, times the noise of shuffling, least share kept): what the modes must meet.
BARS = {"on": (0.20, 2.0, 0.86), "repaired": (0.13, 2.0, 0.86)}
#: Times sooner than text, by tokens of a record.
SOONER = {40: 5.0, 200: 12.0}
WORDS = ("garden", "river", "market", "window", "letter", "summer", "teacher", "bridge", "island", "copper", "yellow")


# ---- a prompt as chat makes it ---------------------------------------------------------------------------------------


def record(number: int, text: str, name: str, at: dt.datetime) -> Record:
    return Record(id=f"r{number}", role="user", name=name, text=text, at=at)


def request(records: Sequence[Record], question: str, *, system: str = SYSTEM, **others: Any) -> Request:
    segments = prompt.lay_out(system=system, recalled=records, turn=Message(role="user", content=question))
    lines = [RecalledLine(record=one.id, line=prompt.record_line(one) + "\n", shown=1) for one in records]
    return Request(segments=segments, recalled=tuple(lines), **others)


class Store:
    """Pages in a passing folder; a verdict that composes without a trial."""

    def __init__(self, folder: Path, codec: Any, *, repaired: bool) -> None:
        folder.mkdir(parents=True)
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, folder / "pages", codec=codec)
        view = self.store.view(b"salt", grid=RecordPages.GRID)
        self.records = RecordPages(view, self.database, repaired=repaired, lay_out=prompt.made_up)
        self.pages = self.store.view(b"salt")

    def close(self) -> None:
        self.store.close()
        self.database.close()


# ---- time ------------------------------------------------------------------------------------------------------------


def sized(engine: Any, tokens: int, number: int, draw: random.Random) -> Record:
    """A record whose line has about this many tokens."""
    words: list[str] = []
    while True:
        one = record(number, " ".join(words), "Nora", dt.datetime(2024, 3, 1 + number, tzinfo=dt.UTC))
        if len(engine.template.encode(prompt.record_line(one) + "\n")) >= tokens:
            return one
        words.append(draw.choice(WORDS))


def paged_system(engine: Any) -> str:
    """A system text whose stable prefix fills a page of 256 tokens and little more."""
    text = SYSTEM
    while engine.template.prompt(request([], "x", system=text).segments).stable <= 256:
        text += " Be brief."
    return text


def times(provider: Any, rounds: int) -> list[dict[str, Any]]:
    engine = provider._ready()
    rows: list[dict[str, Any]] = []
    system = paged_system(engine)
    question = "What did the teacher send from the island?"
    for tokens in SOONER:
        draw = random.Random(tokens)
        records = [sized(engine, tokens, number, draw) for number in range(8)]
        options = Options(max_tokens=1)
        with tempfile.TemporaryDirectory() as folder:
            stores = {
                (codec, mode): Store(Path(folder) / codec / mode, codec, repaired=mode == "repaired")
                for codec in ("raw", "int8")
                for mode in ("on", "repaired")
            }
            ways: dict[str, Request] = {}
            for (codec, mode), store in stores.items():
                asked = request(
                    records, question, system=system, options=options, pages=store.pages, record_pages=store.records
                )
                recall = engine.records.recall(asked)
                store.records.note(recall.subject, {"passed": True})
                for _ in range(4):  # the head's pages, and at most four records an answer
                    provider.generate(asked)
                recall = engine.records.recall(asked)
                assert recall is not None
                assert all(part.pages for part in recall.parts), "the states of some record were not kept"
                ways[f"{mode}, {codec}"] = asked
            bare = stores["raw", "on"].pages
            text = replace(request(records, question, system=system, options=options, pages=bare), recalled=())
            none = replace(request([], question, system=system, options=options, pages=bare), recalled=())
            provider.generate(none)
            ways |= {"text": text, "no records": none}
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, asked in ways.items():
                    taken[name].append(provider.generate(asked).usage.first_token_s or math.nan)
            medians = {name: statistics.median(values) for name, values in taken.items()}
            for name, seconds in medians.items():
                rows.append({"tokens": tokens, "way": name, "seconds": seconds, "sooner": medians["text"] / seconds})
                print(f"  8 x {tokens:3d} tokens, {name:15s} {seconds:7.3f} s  {medians['text'] / seconds:5.1f}x")
            for store in stores.values():
                store.close()
    return rows


# ---- quality ---------------------------------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def questions(path: Path, count: int) -> Iterator[tuple[list[Record], str, str]]:
    """(records, question, answer), types 4, 2, 1 in turn."""
    pools: dict[int, list[tuple[list[Record], str, str]]] = {4: [], 2: [], 1: []}
    for case in json.loads(path.read_text(encoding="utf-8")):
        said = case["conversation"]
        turns: dict[str, Record] = {}
        for number in sorted(int(key.split("_")[1]) for key in said if re.fullmatch(r"session_\d+", key)):
            at = dt.datetime.strptime(said[f"session_{number}_date_time"], "%I:%M %p on %d %B, %Y")
            for turn in said[f"session_{number}"]:
                photo = f" [shares a photo: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
                turns[turn["dia_id"]] = record(len(turns), turn["text"] + photo, turn["speaker"], at)
        known = {name: words(turn.text) for name, turn in turns.items()}
        often = {word: sum(word in held for held in known.values()) for held in known.values() for word in held}
        for item in case["qa"]:
            gold = [f"D{a}:{int(b)}" for text in item["evidence"] for a, b in re.findall(r"D:?(\d+):(\d+)", text)]
            gold = [name for name in dict.fromkeys(gold) if name in turns]
            if item.get("category") not in pools or not 1 <= len(gold) <= 4:
                continue
            asked = words(item["question"])
            near = sorted(
                (name for name in turns if name not in gold),
                key=lambda name: -sum(math.log(len(turns) / often[word]) for word in asked & known[name]),
            )
            chosen = {*gold, *near[:7]}
            records = [turn for name, turn in turns.items() if name in chosen]
            text = f"{item['question']} Give only a short answer."
            pools[item["category"]].append((records, text, str(item["answer"])))
    for pool in pools.values():
        random.Random(7).shuffle(pool)
    order = (4, 2, 1)
    for number in range(min(count, 3 * min(map(len, pools.values())))):
        yield pools[order[number % 3]][number // 3]


class Judge:
    """A model's words about gold answers, over the same tokens in every variant."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.rows: dict[str, list[tuple[float, float, float]]] = {}
        self.draw = random.Random(1)

    def said(self, cache: Any, tokens: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        logits, _ = self.engine.forward([*tokens, *answer[:-1]], cache, (), None, keep=len(answer))
        scores: torch.Tensor = logits.log_softmax(-1)
        return scores

    def passed(self, cache: Any, tokens: Sequence[int], inputs: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        logits: torch.Tensor = self.engine.forward(tokens, cache, (), None, inputs=inputs)[0]
        return logits

    def text(self, tokens: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        return self.said(self.engine.states.empty(len(tokens) + 64), tokens, answer)

    def note(self, name: str, wanted: torch.Tensor, got: torch.Tensor, answer: Sequence[int]) -> None:
        at = torch.arange(len(answer)), torch.tensor(list(answer))
        kl = float((wanted.exp() * (wanted - got)).sum(-1).mean())
        change = float((got[at] - wanted[at]).mean())
        same = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
        self.rows.setdefault(name, []).append((kl, change, same))

    def ask(self, store: Any, records: list[Record], question: str, answer: str) -> None:
        states, template = self.engine.records, self.engine.template
        reply = template.encode(answer)
        recalls = {mode: states.recall(request(records, question, record_pages=store[mode])) for mode in store}
        recall = recalls["on"]
        pieces = recall.pieces
        head, lines, rest = pieces.head.tokens, pieces.lines, pieces.rest
        wanted = self.text(pieces.tokens, reply)
        mixed = self.draw.sample(lines, len(lines))
        self.note("shuffled", wanted, self.text([*head, *(t for line in mixed for t in line), *rest], reply), reply)
        bare = template.prompt(request([], question).segments).tokens
        self.note("no records", wanted, self.text(bare, reply), reply)
        made = [states.made(recall.primer, line, (), None) for line in lines]
        for mode, pages in store.items():
            skip = recalls[mode].skip
            cache = self.engine.states.empty(len(pieces.tokens) + 128)
            step = functools.partial(self.passed, cache)
            step(head, None)
            rows = [states.settled((key[:, :, skip:], value[:, :, skip:]), pages) for key, value in made]
            rows = [row if row[0].shape[2] else None for row in rows]
            states.placed(
                cache, at=len(head), lines=lines, rows=rows, primer=recall.primer, skip=skip, rest=[], step=step
            )
            self.note(mode, wanted, self.said(cache, rest, reply), reply)

    def table(self) -> list[dict[str, Any]]:
        gain = -statistics.fmean(change for _, change, _ in self.rows["no records"])
        table = []
        for name, rows in self.rows.items():
            kls, changes, same = zip(*rows, strict=True)
            change = statistics.fmean(changes)
            table.append(
                {
                    "variant": name,
                    "kl": statistics.fmean(kls),
                    "kl_interval": interval(kls),
                    "change": change,
                    "change_interval": interval(changes),
                    "top1": statistics.fmean(same),
                    "kept": 1 + change / gain,
                }
            )
        return table


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean."""
    draw = random.Random(3)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(1000))
    return means[24], means[974]


class Unkept:
    """Stands for pages where nothing is stored: states are made, settled by the codec and composed at once."""

    grid, codec = 64, "int8"

    def __init__(self, *, repaired: bool) -> None:
        self.repaired = repaired
        self.lay_out = prompt.made_up

    def verdict(self, subject: bytes) -> dict[str, Any]:
        del subject
        return {}


def quality(path: Path, count: int) -> list[dict[str, Any]]:
    provider = load("local", {"dtype": "float32", "threads": 1})
    judge = Judge(provider._ready())  # type: ignore[attr-defined]
    store = {mode: Unkept(repaired=mode == "repaired") for mode in BARS}
    for number, (records, question, answer) in enumerate(questions(path, count), start=1):
        judge.ask(store, records, question, answer)
        if number % 10 == 0:
            print(f"  {number} questions", flush=True)
    provider.close()
    table = judge.table()
    for row in table:
        low, high = row["kl_interval"]
        print(
            f"  {row['variant']:11s} KL {row['kl']:.3f} [{low:.3f}, {high:.3f}]  change {row['change']:+.3f}  "
            f"top-1 {row['top1']:.2f}  kept {row['kept']:.0%}"
        )
    return table


def verdicts(timed: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[str]:
    """Every bar that is missed."""
    missed = []
    for row in timed:
        least = SOONER[row["tokens"]] if row["way"].startswith("on") else 2.0 if "repaired" in row["way"] else 0.0
        if row["sooner"] < least:
            missed.append(f"8 x {row['tokens']} tokens, {row['way']}: {row['sooner']:.1f}x sooner, not {least:g}x")
    by_name = {row["variant"]: row for row in table}
    for mode, (kl, times_noise, kept) in BARS.items() if by_name else ():
        row, noise = by_name[mode], by_name["shuffled"]["kl"]
        if row["kl"] > kl:
            missed.append(f"{mode}: KL {row['kl']:.3f}, not {kl}")
        if row["kl"] > times_noise * noise:
            missed.append(f"{mode}: KL is {row['kl'] / noise:.1f} times that of shuffling, not {times_noise:g}")
        if row["kept"] < kept:
            missed.append(f"{mode}: {row['kept']:.0%} kept, not {kept:.0%}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="of the timed model; quality is measured in float32")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    torch.set_num_threads(1)
    provider = load("local", {"threads": 1, "dtype": options.dtype})
    timed = times(provider, options.rounds)
    provider.close()
    table: list[dict[str, Any]] = []
    if options.questions and options.data.is_file():
        table = quality(options.data, options.questions)
    elif options.questions:
        print(f"no LoCoMo data at {options.data}: quality is not measured")
    missed = verdicts(timed, table)
    print("\n".join(f"missed: {sentence}" for sentence in missed) or "every bar is met")
    asked = options.questions if table else 0
    result = {"dtype": options.dtype, "questions": asked, "times": timed, "quality": table, "missed": missed}
    RESULTS.write_text(
        json.dumps(result, indent=1) + "\n",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

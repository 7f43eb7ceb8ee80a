"""Fits the numbers of agentmem/plaintext/fusion.json with the signals that a search computes; says how good they are.

    EVAL_CACHE=/tmp/cache python tests/benchmarks/fit_retrieval.py --shared ../shared [--write] [--json report.json]

One set of numbers for all data sets, LoCoMo both as records of its speakers and ("locomo chat") as two chats store it,
in each of which another speaker is the user: a listwise softmax regression (Cao et al. 2007) over signals x (1, what
the query is like), then a logistic regression of the score (Platt 1999) for the probability. The tables are out of
fold: of four folds, each has one LoCoMo conversation, one BEAM chat and a quarter of PrefEval's topics; what is told of
a fold was fitted on the other three. Questions without evidence are LoCoMo's asked of another conversation's memory,
BEAM's abstention questions and small talk, half of which is never fitted on.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval_system import as_chat, embedder, filled  # type: ignore[import-not-found]
from small_talk import SMALL_TALK  # type: ignore[import-not-found]

from agentmem import Memory
from agentmem.plaintext import fusion
from agentmem.plaintext.encoded import Embedder, encode_with
from agentmem.plaintext.signals import KINDS, Signals
from agentmem.types import Scope

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "agentmem" / "plaintext" / "fusion.json"
WORDS = [
    *("turn", "window", "session", "turn_answer", "answer_share", "window_share", "rarest"),
    *("speaker", "year", "month", "day", "when", "question", "assistant", "answer", "length"),
]
VECTORS = [*WORDS, "cosine", "cosine_window", "cosine_question", "cosine_next"]
TOKENS = [
    *("tokens", "tokens_plain", "tokens_rare", "tokens_answer", "tokens_window", "tokens_wide"),
    *("tokens_session", "tokens_plain_window"),
]
SIGNALS = {"words": WORDS, "vectors": VECTORS, "tokens": [*VECTORS, *TOKENS]}
GATES = {
    "words": ["evidence", "assistants", "lectures", "stems", "rarity"],
    "vectors": ["evidence", "assistants", "lectures", "stems", "rarity", "best_cosine"],
    "tokens": ["evidence", "assistants", "lectures", "stems", "rarity", "best_cosine"],
}
TOLD = ["evidence", "rarity", "unknown", "stems", "contents", "chatter", "personal", "named", "names", "records"]
TOLD_BY = {"words": TOLD, "vectors": [*TOLD, "best_cosine"], "tokens": [*TOLD, "best_cosine", "best_match"]}
#: What each data set weighs in the fit, however many questions it has.
SHARES = {
    "locomo": 0.4,
    "locomo chat": 0.22,
    "prefeval": 0.25,
    "beam": 0.22,
    "few": 0.06,
    "foreign": 0.3,
    "abstention": 0.05,
    "small talk": 0.3,
    "few foreign": 0.05,
    "few small talk": 0.05,
}
FOLDS = 4
#: What a prompt takes (`fusion.taken`): the first rule is the one that is written. Where .2 is enough, 13 % of the
#: turns of small talk recall something, where it takes .3, 5 %; that would leave out 2 of 83 that questions need.
RULES = [
    {"evidence": evidence, "asking": asking, "least": least, "beside_best": 0.05}
    for evidence, asking, least in (
        (0.3, 0.15, 0.02),
        (0.1, 0.1, 0.02),
        (0.2, 0.2, 0.02),
        (0.3, 0.3, 0.02),
        (0, 0, 0.05),
    )
]


@dataclass
class Asked:
    """One question to one memory, measured."""

    dataset: str
    fold: int
    signals: dict[str, Signals]
    gold: dict[str, Any]  # by kind, bool [pool]
    total: int  # gold records there are, found or not
    lines: dict[str, Any]  # by kind, tokens of each candidate's shown text
    held_out: bool = False
    score: dict[str, Any] = field(default_factory=dict)


def collect(shared: Path) -> list[Asked]:
    """All questions of the development data, each with the signals of its candidates."""
    sys.path.insert(0, str(shared / "eval"))
    loaders = importlib.import_module("datasets_io").LOADERS
    model = embedder()
    found: list[Asked] = []
    for dataset in ("locomo", "prefeval", "beam"):
        cases = loaders[dataset](str(shared / "data"))
        for number, case in enumerate(cases):
            begun = time.perf_counter()
            memory, ids = filled(case["items"], model)
            with memory:
                found += _ask(memory, ids, case, cases, dataset, number, shared, model)
            if dataset == "locomo":
                found += _few(case, cases[(number + 1) % len(cases)], number, model)
                for chat in _chats(case):
                    memory, ids = filled(chat["items"], model)
                    with memory:
                        found += _ask(memory, ids, chat, cases, "locomo chat", number, shared, model)
                    found += _few(chat, cases[(number + 1) % len(cases)], number, model)
            print(f"{case['name']}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    return found


def _chats(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The conversation as two chats store it: each speaker is the user once, of the second one no name is known."""
    for user, named in zip(dict.fromkeys(item["speaker"] for item in case["items"]), (True, False), strict=True):
        told = as_chat(case["items"], user, named=named)
        within = {item: said["id"] for said, ids in told for item in ids}
        asked = [{**question, "gold": {within[item] for item in question["gold"]}} for question in case["questions"]]
        yield {**case, "items": [said for said, _ in told], "questions": asked}


class _Asker:
    """Measures questions to one memory."""

    def __init__(self, memory: Memory, ids: dict[str, str], case: dict[str, Any], model: Embedder) -> None:
        self._engine, self._model = memory._engine, model
        rows = self._engine.database.query("SELECT seq, id FROM records")
        self._item_of = {row["seq"]: ids[row["id"]] for row in rows}
        text_of = {item["id"]: (item.get("time"), item["speaker"], item["text"]) for item in case["items"]}
        count = importlib.import_module("eval_retrieval").ntok
        self._cost = {}
        for row in self._engine.database.query("SELECT seq, part, start, stop FROM vectors"):
            when, who, text = text_of[self._item_of[row["seq"]]]
            shown = f"[{when}] " if when else ""
            self._cost[row["seq"], row["part"]] = count(f"{shown}{who}: {text[row['start'] : row['stop']]}")

    def __call__(self, text: str, gold: set[str], name: str, fold: int, *, held_out: bool = False) -> Asked:
        signals, golds, lines = {}, {}, {}
        encoded = encode_with(self._model, [text], query=True)
        engine = self._engine
        for kind in KINDS:
            found = engine.searcher.measure(
                text,
                None if kind == "words" else encoded,
                index=None if kind == "words" else engine.index,
                tokens=engine.tokens if kind == "tokens" else None,
                scope=Scope(user="benchmark"),
                now=time.time(),
            )
            if len(found.pool) and found.signals.kind == kind:
                seqs = found.pool.view.seq[found.pool.places].tolist()
                parts = found.signals.part.tolist()
                signals[kind] = found.signals
                golds[kind] = np.array([self._item_of[seq] in gold for seq in seqs])
                lines[kind] = np.array([self._cost[pair] for pair in zip(seqs, parts, strict=True)])
        return Asked(name, fold, signals, golds, len(gold), lines, held_out)


def _few(case: dict[str, Any], other: dict[str, Any], number: int, model: Embedder) -> Iterator[Asked]:
    """Questions to memories of one to thirty records: the evidence and others of the conversation, in order."""
    random = np.random.default_rng(number)
    items = case["items"]
    place = {item["id"]: row for row, item in enumerate(items)}
    for question in random.choice(case["questions"], 40, replace=False):
        rows = {place[item] for item in question["gold"]}
        rows |= set(random.choice(len(items), int(random.integers(0, 30)), replace=False).tolist())
        small = {"items": [items[row] for row in sorted(rows)]}
        memory, ids = filled(small["items"], model)
        with memory:
            ask = _Asker(memory, ids, small, model)
            yield ask(question["text"], set(question["gold"]), "few", number)
            yield ask(random.choice(other["questions"])["text"], set(), "few foreign", number)
            for at in random.choice(len(SMALL_TALK), 2, replace=False).tolist():
                yield ask(SMALL_TALK[at], set(), "few small talk", number, held_out=at % 2 == 1)


def _ask(
    memory: Memory,
    ids: dict[str, str],
    case: dict[str, Any],
    cases: Sequence[dict[str, Any]],
    dataset: str,
    number: int,
    shared: Path,
    model: Embedder,
) -> Iterator[Asked]:
    ask = _Asker(memory, ids, case, model)
    topics = sorted({question["id"].rsplit("-", 1)[0] for question in case["questions"]})
    for question in case["questions"]:
        fold = (
            topics.index(question["id"].rsplit("-", 1)[0]) * FOLDS // len(topics) if dataset == "prefeval" else number
        )
        yield ask(question["text"], set(question["gold"]), dataset, fold % FOLDS)
    if dataset in ("locomo", "locomo chat"):
        other = cases[(number + 1) % len(cases)]
        for question in other["questions"][::3]:
            yield ask(question["text"], set(), "foreign", number)
    if dataset == "beam":
        folder = case["name"].rsplit("-", 1)[1]
        probes = json.loads((shared / "data" / "beam" / "100K" / folder / "probing_questions.json").read_text("utf-8"))
        for question in probes.get("abstention", []):
            yield ask(question["question"], set(), "abstention", number)
    for place, text in enumerate(SMALL_TALK):
        yield ask(text, set(), "small talk", number % FOLDS, held_out=place % 2 == 1)


# ---- fitting -------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Questions as one matrix: the candidates of all of them, one below the other."""

    values: torch.Tensor  # [rows, signals]
    owner: torch.Tensor  # [rows], which question
    gates: torch.Tensor  # [questions, gates]
    gold: torch.Tensor  # [rows]
    weight: torch.Tensor  # [questions], adds up to 1


def scaling(asked: Sequence[Asked], kind: str, names: Sequence[str]) -> tuple[Any, Any]:
    """Mean and spread of what these queries are like."""
    numbers = np.array([[a.signals[kind].query.get(name, 0.0) for name in names] for a in asked], np.float32)
    return numbers.mean(0).astype(float).round(4), (numbers.std(0) + 1e-3).astype(float).round(4)


def weights_of(asked: Sequence[Asked]) -> Any:
    """What each question weighs, by `SHARES`."""
    counts: dict[str, int] = {}
    for one in asked:
        counts[one.dataset] = counts.get(one.dataset, 0) + 1
    weights = np.array([SHARES[one.dataset] / counts[one.dataset] for one in asked])
    return weights / weights.sum()


def spread_of(asked: Sequence[Asked], kind: str) -> Any:
    """The mean variance of each signal in a pool; 1 for one that never varies."""
    rows = [[float(one.signals[kind].rows[name].var()) for name in SIGNALS[kind]] for one in asked]
    spread = np.average(rows, axis=0, weights=weights_of(asked))
    return np.array([float(f"{value:.4g}") if value > 0 else 1.0 for value in spread], np.float32)


def batch(asked: Sequence[Asked], kind: str, scale: tuple[Any, Any], spread: Any) -> Batch:
    """These questions as one matrix."""
    values = [fusion.matrix(one.signals[kind], SIGNALS[kind], spread).T for one in asked]
    owner = np.repeat(np.arange(len(asked)), [len(rows) for rows in values])
    gates = np.stack([fusion.query_numbers(one.signals[kind].query, GATES[kind], *scale) for one in asked])
    gold = np.concatenate([one.gold[kind] for one in asked])
    return Batch(
        torch.tensor(np.concatenate(values)),
        torch.tensor(owner),
        torch.tensor(gates),
        torch.tensor(gold),
        torch.tensor(weights_of(asked), dtype=torch.float32),
    )


def loss(score: torch.Tensor, data: Batch) -> torch.Tensor:
    """Each gold record against the question's other candidates: mean negative log of its softmax."""
    count = len(data.weight)
    most = torch.full((count,), -1e9).scatter_reduce(0, data.owner, score, "amax").detach()
    heights = torch.exp(score - most[data.owner])
    others = torch.zeros(count).index_add(0, data.owner, heights * ~data.gold)
    gold = torch.nonzero(data.gold)[:, 0]
    owner = data.owner[gold]
    costs = torch.log(others[owner] + heights[gold]) - torch.log(heights[gold] + 1e-30)
    found = torch.zeros(count).index_add(0, owner, torch.ones(len(owner)))
    return (torch.zeros(count).index_add(0, owner, costs) / found.clamp(min=1) * data.weight).sum()


def fit(data: Batch, steps: int = 80) -> tuple[Any, Any]:
    """Weights [signals] and what each number of the query adds to them [signals, gates]. The problem is convex."""
    weights = torch.zeros(data.values.shape[1], requires_grad=True)
    by_query = torch.zeros(data.values.shape[1], data.gates.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights, by_query], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gates = data.gates[data.owner]
    for _ in range(steps):
        optimizer.zero_grad()
        # The same as a sum of values x (weights + by_query @ gates), without a matrix of all of them.
        parts = data.values @ torch.cat([weights[:, None], by_query], dim=1)
        score = parts[:, 0] + (parts[:, 1:] * gates).sum(1)
        total = loss(score, data) + 0.0005 * weights.square().sum() + 0.006 * by_query.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return weights.detach().double().numpy().round(4), by_query.detach().double().numpy().round(4)


def calibrate(asked: Sequence[Asked], kind: str, scale: tuple[Any, Any], steps: int = 300) -> dict[str, Any]:
    """Log-odds from the score, the score's share of the pool, and what the query is like."""
    rows, gold, weight = [], [], []
    for one, share in zip(asked, weights_of(asked), strict=True):
        score = one.score[kind]
        told = fusion.query_numbers(one.signals[kind].query, TOLD_BY[kind], *scale)
        rows.append(np.column_stack([score, score - fusion.log_sum(score), np.tile(told, (len(score), 1))]))
        gold.append(one.gold[kind])
        weight.append(np.full(len(score), share))
    features = torch.tensor(np.concatenate(rows), dtype=torch.float32)
    target = torch.tensor(np.concatenate(gold), dtype=torch.float32)
    weights = torch.tensor(np.concatenate(weight), dtype=torch.float32)
    numbers = torch.zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        odds = features @ numbers[1:] + numbers[0]
        costs = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="none")
        total = (costs * weights).sum() + 0.0005 * numbers[3:].square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    constant, slope, share, *told = numbers.detach().double().numpy().round(4).tolist()
    return {"slope": slope, "share": share, "constant": constant, "told": told}


def numbers_of(asked: Sequence[Asked], kind: str) -> dict[str, Any]:
    """One kind's numbers, fitted on these questions; the calibration is left at "the score itself"."""
    ranked = [one for one in asked if one.total and kind in one.signals and one.gold[kind].any()]
    scale = scaling(ranked, kind, GATES[kind])
    spread = spread_of(ranked, kind)
    weights, by_query = fit(batch(ranked, kind, scale, spread))
    return {
        "signals": SIGNALS[kind],
        "gates": GATES[kind],
        "spread": [float(f"{value:.4g}") for value in spread.tolist()],
        "centre": scale[0].tolist(),
        "scale": scale[1].tolist(),
        "weights": weights.tolist(),
        "by_query": by_query.tolist(),
        "slope": 1.0,
        "share": 0.0,
        "constant": 0.0,
        "told_by": [],
        "told_centre": [],
        "told_scale": [],
        "told": [],
    }


def calibrated(numbers: dict[str, Any], asked: Sequence[Asked], kind: str) -> dict[str, Any]:
    """The numbers with a calibration on these questions' out-of-fold scores."""
    usable = [one for one in asked if kind in one.signals and not one.held_out]
    scale = scaling(usable, kind, TOLD_BY[kind])
    found = calibrate(usable, kind, scale)
    names = {"told_by": TOLD_BY[kind], "told_centre": scale[0].tolist(), "told_scale": scale[1].tolist()}
    return {**numbers, **found, **names}


# ---- what is told --------------------------------------------------------------------------------------------------


def ranking(asked: Sequence[Asked], kind: str) -> dict[str, dict[str, float]]:
    """Recall in percent by data set, of the out-of-fold scores."""
    table: dict[str, dict[str, float]] = {}
    for dataset in ("locomo", "locomo chat", "prefeval", "beam"):
        rows = []
        for one in (one for one in asked if one.dataset == dataset):
            row = dict.fromkeys(["@1", "@5", "@10", "@20", "250 tok", "500 tok", "1000 tok"], 0.0)
            if kind in one.score:
                order = np.argsort(-one.score[kind], kind="stable")[:60]
                found = np.cumsum(one.gold[kind][order]) / one.total
                used = np.cumsum(one.lines[kind][order])
                row |= {f"@{k}": float(found[min(k, len(found)) - 1]) for k in (1, 5, 10, 20)}
                row |= {f"{b} tok": float(found[used <= b].max(initial=0)) for b in (250, 500, 1000)}
            rows.append(row)
        table[dataset] = {name: round(100 * float(np.mean([row[name] for row in rows])), 1) for name in rows[0]}
    return table


def taken(
    asked: Sequence[Asked], kind: str, chance: dict[int, Any], rule: dict[str, float], most: int
) -> dict[str, dict[str, float]]:
    """What a prompt takes of the best so many: how many records, in how many turns none, and the recall they keep."""
    table = {}
    for dataset in dict.fromkeys(one.dataset for one in asked):
        mine = [one for one in asked if one.dataset == dataset and ("small talk" not in dataset or one.held_out)]
        counts, recalls = [], []
        for one in mine:
            values = chance.get(id(one), np.empty(0))
            order = np.argsort(-values, kind="stable")[:most]
            order = order[: fusion.taken(values[order].tolist(), asking="small talk" not in dataset, rule=rule)]
            counts.append(len(order))
            if one.total:
                recalls.append(one.gold[kind][order].sum() / one.total if len(order) else 0.0)
        table[dataset] = {"records": round(float(np.mean(counts)), 2)}
        table[dataset]["none"] = round(100 * float(np.mean(np.array(counts) == 0)), 1)
        if recalls:
            table[dataset]["recall"] = round(100 * float(np.mean(recalls)), 1)
    return table


def reliability(asked: Sequence[Asked], kind: str, chance: dict[int, Any]) -> dict[str, Any]:
    """Expected calibration error over the ten best of each question with evidence, and the bins it comes from."""
    values, gold = [], []
    for one in (one for one in asked if one.total and id(one) in chance and one.dataset != "few"):
        order = np.argsort(-chance[id(one)])[:10]
        values.append(chance[id(one)][order])
        gold.append(one.gold[kind][order])
    said, true = np.concatenate(values), np.concatenate(gold)
    bins = np.minimum((said * 10).astype(int), 9)
    rows = [
        (float(said[bins == b].mean()), float(true[bins == b].mean()), int((bins == b).sum())) for b in np.unique(bins)
    ]
    error = sum(count * abs(mean - share) for mean, share, count in rows) / len(said)
    return {"ece": round(error, 4), "bins": [(round(a, 3), round(b, 3), count) for a, b, count in rows]}


def cross_validated(asked: Sequence[Asked], kind: str) -> dict[int, Any]:
    """Score every question by numbers of the other folds; returns the probabilities, calibrated out of fold too."""
    fitted = [numbers_of([one for one in asked if one.fold != fold], kind) for fold in range(FOLDS)]
    for fold, numbers in enumerate(fitted):
        ranked = fusion.build(numbers)
        for one in (one for one in asked if one.fold == fold and kind in one.signals):
            one.score[kind] = ranked.fuse(one.signals[kind]).score
    chance: dict[int, Any] = {}
    for fold, numbers in enumerate(fitted):
        rest = [one for one in asked if one.fold != fold]
        final = fusion.build(calibrated(numbers, rest, kind))
        for one in (one for one in asked if one.fold == fold and kind in one.signals):
            chance[id(one)] = final.fuse(one.signals[kind]).probability
    return chance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with eval/ and data/")
    parser.add_argument("--write", action="store_true", help="write fusion.json")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    asked = collect(options.shared)
    report: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        chance = cross_validated(asked, kind)
        report[kind] = {"recall": ranking(asked, kind), "reliability": reliability(asked, kind, chance)}
        print(f"\n{kind}, out of fold")
        for dataset, row in report[kind]["recall"].items():
            print(f"  {dataset:9s}", "  ".join(f"{name} {value:5.1f}" for name, value in row.items()))
        print("  expected calibration error", report[kind]["reliability"]["ece"], report[kind]["reliability"]["bins"])
        for rule, most in ((rule, most) for rule in RULES for most in (6, 10)):
            table = taken(asked, kind, chance, rule, most)
            report[kind][f"taken of {most} by {rule}"] = table
            print(f"  of {most} by {rule}:", "; ".join(f"{name} {row}" for name, row in table.items()))
        kinds[kind] = calibrated(numbers_of(asked, kind), asked, kind)
    if options.write:
        made = dt.datetime.now(dt.UTC).date().isoformat()
        data = (
            "development halves of LoCoMo (4 conversations, also as 8 chats), PrefEval (8 topics), BEAM 100K (4 chats)"
        )
        head = {"made": made, "by": "tests/benchmarks/fit_retrieval.py", "data": data, "taken": RULES[0]}
        FILE.write_text(_text({**head, "kinds": kinds}), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _text(value: dict[str, Any]) -> str:
    """JSON with one line per list, so that a change can be read."""
    import re

    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^\[\]]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


if __name__ == "__main__":
    main()

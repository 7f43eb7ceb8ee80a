"""The head of a scope's prompts as a trained prefix: distil it, list what there is, drop it.

Orders core block, corpus, training, gate and page store; knows nothing of tensors and nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import cores, planning, prompt
from .activation.trained import base_of
from .engine import Engine
from .errors import ConfigError, InvalidInput, NotFound
from .flow import Flow, Work
from .heads import given
from .parametric.corpus import Example
from .parametric.prefix import head_of, lesson
from .plaintext.drafts import shown
from .progress import progress
from .teaching import Stop, corpus_of, model_of
from .types import Message, Scope, Usage

if TYPE_CHECKING:
    from .activation.trained import StoredPrefix, TrainedPages
    from .parametric.corpus import Corpus
    from .parametric.prefix import Lesson
    from .parametric.prefix_gate import TrainedPrefix
    from .parametric.train import Tensors
    from .types import Record

__all__ = ["distil", "drop_prefix", "prefixes"]

#: The head has so many tokens for each position, where nothing else is asked for.
PART = 4
#: Questions without an answer of their own that are held still beside the lessons.
GENERAL = 16
#: A record that the corpus can't ask about is asked for by its beginning.
_QUOTE = "Repeat what I said, word for word, that begins with: {begin}"
_QUOTE_HELD_OUT = 'How does it go on, in my own words: "{begin}"?'


def distil(engine: Engine, scope: Scope, *, tokens: int | None, system: str | None, seed: int) -> Flow[TrainedPrefix]:
    """Distil the head of this scope's prompts; see `Parametric.distil`."""
    number: Any = seed
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
        raise InvalidInput(f"seed is {shown(seed)}: give a whole number")
    text = given(engine, system)

    def work(stop: Stop) -> TrainedPrefix:
        return _distil(engine, scope, tokens, text, seed=seed, stop=stop)

    prefix: TrainedPrefix = yield Work(work)
    return prefix


def _distil(
    engine: Engine, scope: Scope, tokens: int | None, system: str | None, *, seed: int, stop: Stop
) -> TrainedPrefix:
    from .parametric.prefix import distil as learn
    from .parametric.prefix_gate import UNRELATED, TrainedPrefix, judge

    tensors = model_of(engine)
    pages = _pages(engine, scope)
    records = _core(engine, scope)
    if not records:
        raise InvalidInput(
            f"{scope} has no core block yet: there are too few records that its prompts would begin with"
        )
    heads = _Heads(tensors, system, records)
    length = _length(tokens, len(heads.full), pages.GRID)
    corpus = corpus_of(engine, scope, records)
    examples, questions = _examples(corpus, records)
    lessons, asked = heads.lessons(examples), heads.lessons(questions)
    if not asked:
        raise InvalidInput(
            "nothing can be asked about these records in the model's chat form: the gate has no question"
        )
    with progress("distilling") as moved:
        trained = learn(tensors, heads.full, lessons, tokens=length, seed=seed, progress=moved, stop=stop)
    arrays = trained.arrays()
    encoded = pages.settled(arrays)  # with a codec that changes bits these are what is judged, and what will be found
    report = judge(
        tensors,
        trained,
        asked,
        heads.general(UNRELATED),
        truncated=heads.truncated(length),
        nothing=heads.nothing,
    )
    # With the user's own past questions that were trained: what was learnt from them goes with them too.
    ids = tuple(dict.fromkeys([*(record.id for record in records), *corpus.records]))
    kept = None
    if report.passed:
        kept = pages.keep(
            base_of(tensors.identity, trained.dtype),
            heads.full,
            arrays,
            encoded=encoded,
            records=ids,
            report={"gate": report.model_dump(mode="json"), "cpu_seconds": trained.cpu_seconds},
            seconds=trained.cpu_seconds,
            owner=engine.keyed(f"{engine.cache_key(scope)} {system or ''}"),
        )
    spent = Usage(total_s=trained.seconds)
    engine.ledger.note("train", tensors.name, scope, spent, size=0 if kept is None else kept.bytes, here=True)
    if kept is not None:
        return _value(kept)
    return TrainedPrefix(
        name="not kept",
        digest="",
        tokens=length,
        stands_for=len(heads.full),
        records=ids,
        gate=report,
        cpu_seconds=trained.cpu_seconds,
    )


def _core(engine: Engine, scope: Scope) -> list[Record]:
    """The core block that the next session begins with: where prompts are laid out by cost the one that stands, which
    only a collapse rewrites; chosen now where there is none."""
    stands = None if planning.planned(engine, scope) is None else cores.standing(engine, scope)
    return stands or cores.core(engine, scope, None, frozenset(), new_session=True)


def prefixes(engine: Engine, scope: Scope) -> list[TrainedPrefix]:
    """The trained prefixes made of records that this scope sees, newest first."""
    found = _pages(engine, scope).entries()
    seen = {id_ for entry in found for id_ in entry.records}
    mine = {record.id for record in engine.records.named(sorted(seen), scope)}
    return [_value(entry) for entry in found if mine.issuperset(entry.records)]


def drop_prefix(engine: Engine, scope: Scope, prefix: str | TrainedPrefix) -> None:
    """Delete a trained prefix, given as value, name or digest: its prompts are read in full again."""
    wanted: Any = getattr(prefix, "digest", prefix)
    found = [one for one in prefixes(engine, scope) if wanted in (one.digest, one.name)]
    if not found:
        raise NotFound(f"no trained prefix {shown(wanted)} in {scope}: see prefixes()")
    _pages(engine, scope).drop(found[0].digest)


class _Heads:
    """What a scope's prompts begin with: in full, without the core block, and cut short."""

    def __init__(self, tensors: Tensors, system: str | None, records: Sequence[Record]) -> None:
        self._tensors, self._system, self._records = tensors, system, records
        self._messages = self._begun(records)
        self.full = head_of(tensors, self._messages)
        self.nothing = head_of(tensors, self._begun(()))

    def _begun(self, records: Sequence[Record]) -> list[Message]:
        """The messages of a request that has nothing but its head, laid out as chat does."""
        core = prompt.quote(records) if records else None
        segments = prompt.lay_out(system=self._system, core=core)
        return [message for segment in segments for message in segment.messages]

    def truncated(self, tokens: int) -> list[int]:
        """The head with as many of its first records as fit into so many tokens."""
        best, low, high = self.nothing, 1, len(self._records)
        while low <= high:
            middle = (low + high) // 2
            head = head_of(self._tensors, self._begun(self._records[:middle]))
            if len(head) <= tokens:
                best, low = head, middle + 1
            else:
                high = middle - 1
        return best

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """The examples asked behind the head."""
        made = (lesson(self._tensors, self._messages, self.full, example) for example in examples)
        return list(dict.fromkeys(one for one in made if one is not None))

    def general(self, questions: Sequence[str]) -> list[Lesson]:
        """Questions without an answer of their own."""
        return self.lessons([Example(question, "", (), ()) for question in questions])


def _examples(corpus: Corpus, records: Sequence[Record]) -> tuple[list[Example], list[Example]]:
    """What is trained, and what the gate asks. No record is left out: one that the corpus has no question about is
    asked for by its first words, or the prefix might lose it and nobody would know."""
    still = [*corpus.anchors, *corpus.neighbours]
    trained = [*corpus.examples, *still[:: max(1, len(still) // GENERAL)]]
    asked = [*corpus.held_out, *corpus.natural]
    known = {id_ for example in asked for id_ in example.records}
    for record in records:
        if record.id not in known:
            begin = " ".join(record.text.split()[:4])
            for wording, examples in ((_QUOTE, trained), (_QUOTE_HELD_OUT, asked)):
                examples.append(Example(wording.format(begin=begin), record.text, (), (record.id,)))
    return trained, asked


def _length(tokens: Any, head: int, grid: int) -> int:
    """Positions of the prefix: what was asked for, or the part of the head that it can well be."""
    if tokens is None:
        tokens = max(grid, head // PART // grid * grid)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < grid or tokens % grid:
        raise InvalidInput(f"tokens is {shown(tokens)}: give a multiple of {grid}")
    if 2 * tokens > head:
        raise InvalidInput(
            f"a prefix of {tokens} positions for a head of {head} tokens saves too little: it has to be half of it at "
            f"most, and {grid} at least"
        )
    return tokens


def _pages(engine: Engine, scope: Scope) -> TrainedPages:
    engine.chat_provider()  # raises where there is no model
    pages = engine.prefix_view(scope)
    if pages is None:
        raise ConfigError(
            "a trained prefix is kept as KV pages of a local model: it needs model='local' and a page_budget above 0"
        )
    return pages


def _value(entry: StoredPrefix) -> TrainedPrefix:
    from .parametric.prefix_gate import PrefixGate, TrainedPrefix

    return TrainedPrefix(
        name=f"prefix-{entry.digest[:12]}",
        digest=entry.digest,
        tokens=entry.tokens,
        stands_for=entry.stands_for,
        records=entry.records,
        gate=PrefixGate.model_validate(entry.report["gate"]),
        bytes=entry.bytes,
        cpu_seconds=entry.report["cpu_seconds"],
    )

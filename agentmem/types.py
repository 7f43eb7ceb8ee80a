"""Values that travel: what goes into the verbs and what comes out of them.

All are pydantic models. They know nothing of stores or providers and hold no open resource, so they can be kept,
compared, serialised and sent elsewhere.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

from pydantic import Field

from .value import LEVELS, Scope, Value

__all__ = [
    "LEVELS",
    "Attended",
    "CacheUse",
    "Compaction",
    "Change",
    "Context",
    "Erasure",
    "Extraction",
    "Hit",
    "Image",
    "Message",
    "Reconciliation",
    "Record",
    "Reply",
    "Retraining",
    "Role",
    "Scope",
    "Segment",
    "TokenCount",
    "ToolCall",
    "TurnFacts",
    "Usage",
    "Value",
    "Verification",
]

Role = Literal["system", "user", "assistant", "tool"]


class Record(Value):
    """One remembered text, exactly as it was given."""

    id: str
    text: str
    role: Role = "user"
    name: str | None = None
    at: dt.datetime | None = Field(default=None, description="when it was said or happened, as the caller told it")
    valid_from: dt.datetime | None = None
    valid_until: dt.datetime | None = None
    scope: Scope = Scope()
    metadata: dict[str, Any] = Field(default={})
    source: str | None = Field(default=None, description="where it came from: a file, an address, a tool")
    trust: Literal["trusted", "untrusted"] = "trusted"
    created: dt.datetime | None = Field(default=None, description="when agentmem stored this version")
    version: int = 1

    def __str__(self) -> str:
        return f"[{self.id}] {self.name or self.role}: {self.text}"


class Hit(Value):
    """A record found by a search. ``score`` is the probability that it is evidence for the query, 0 to 1.

    ``why`` holds the parts of that probability's log-odds by name (``words``, ``meaning``, ...). ``start`` and ``stop``
    are the characters of the best passage of a long text; (0, None) is all of it.
    """

    record: Record
    score: float
    why: dict[str, float] = Field(default={})
    start: int = 0
    stop: int | None = None

    @property
    def passage(self) -> str:
        """The part of the record's text that fits the query best; all of a short one."""
        return self.record.text[self.start : self.stop]

    def __str__(self) -> str:
        return f"{self.score:.3f} {self.record}"


class Change(Value):
    """One step of how a matter changed: ``new`` took the place of ``old`` at ``at``.

    ``old`` is None where the matter was told for the first time, ``new`` where it ended and nothing followed. Both are
    versions of one record where its text was corrected.
    """

    at: dt.datetime | None
    old: Record | None
    new: Record | None

    def __str__(self) -> str:
        day = self.at.date().isoformat() if self.at else "at some time"
        if self.new is None:
            return f"{day}: no longer: {self.old.text if self.old else ''}"
        return f"{day}: {self.new.text}" + (f" (before: {self.old.text})" if self.old else "")


class ToolCall(Value):
    """A call of a tool that the model asks for. ``arguments`` is the parsed JSON object."""

    id: str
    name: str
    arguments: dict[str, Any] = Field(default={})


class Image(Value):
    """An image that stands beside a message's text: its bytes as base64 with their media type, or where it lies."""

    data: str | None = Field(default=None, repr=False, description="base64")
    media_type: str | None = None
    url: str | None = None


class Message(Value):
    """One message of a prompt. ``records`` are the ids of the records that its text was made from (lineage).

    ``images`` stand before the text. ``blocks`` are a vendor's own parts of an answer that has to get them back with
    the results of its tools (thinking, reasoning), as it sent them; ``blocks_of`` names the model that wrote them, and
    only that one's adapter sends them.
    """

    role: Role
    content: str
    name: str | None = None
    images: tuple[Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    blocks: tuple[dict[str, Any], ...] = ()
    blocks_of: str | None = None
    records: tuple[str, ...] = ()


class Segment(Value):
    """A part of a prompt with one rate of change, in the order system, core, history, turn.

    A ``stable`` segment is byte-equal in the next request, or grows only at its end (history); a cache may be kept up
    to the end of any stable segment. A stable turn will stand in the next request's history as it is. What follows the
    last stable segment is new in every request and is never cached.
    """

    name: Literal["system", "core", "history", "turn"]
    messages: tuple[Message, ...]
    stable: bool


class Usage(Value):
    """What one request used. ``input_tokens`` counts the whole prompt, cached tokens included, on every provider.

    ``cached_tokens`` were read from a cache, ``written_tokens`` were newly put into one (where the provider says so, or
    the KV pages that were sealed, or the slots that were saved); ``written_long_tokens`` are those of them that the
    host keeps for a longer, dearer time than its shortest (an hour at Anthropic, twelve at OpenAI).
    ``estimated_cached_tokens`` is set, and ``cached_tokens`` 0, where the provider counts none and reuse could only be
    inferred from its times. Seconds are wall time: to the first piece of text, and in all.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    written_long_tokens: int = 0
    output_tokens: int = 0
    estimated_cached_tokens: int | None = None
    first_token_s: float | None = None
    total_s: float = 0.0

    def __str__(self) -> str:
        first = "" if self.first_token_s is None else f", first token after {self.first_token_s:.2f} s"
        return (
            f"{self.input_tokens} tokens in ({self.cached_tokens} cached, {self.written_tokens} written), "
            f"{self.output_tokens} out{first}, {self.total_s:.2f} s in all"
        )


class Attended(Value):
    """What a local model attended to in place, without copying or decoding it, when its answer ended.

    ``tokens`` of the prompt and the answer were read as KV pages of ``codec``, ``bytes`` of them; ``stock_bytes`` is
    what the same positions take in the dtype that the model computes in. ``record_tokens`` came as KV states of
    recalled records, which were computed elsewhere: that part is approximate. So is a trained prefix, whose
    ``trained_tokens`` positions stood for the first ``stands_for`` tokens of the prompt. Without attention in place
    all these are copied, and ``tokens`` is 0.
    """

    codec: str
    tokens: int = 0
    bytes: int = 0
    stock_bytes: int = 0
    record_tokens: int = 0
    trained_tokens: int = 0
    stands_for: int = 0

    def __str__(self) -> str:
        trained = f"a trained prefix of {self.trained_tokens} positions stood for {self.stands_for} tokens"
        if not self.tokens and self.trained_tokens:
            return f"{trained} ({self.codec}), approximately"
        if not self.tokens:
            return f"{self.record_tokens} tokens of recalled records came as KV states ({self.codec}), approximately"
        records = f", {self.record_tokens} of them recalled records" if self.record_tokens else ""
        records += f", {trained}" if self.trained_tokens else ""
        return (
            f"{self.tokens} tokens{records} attended in place as {self.codec}: "
            f"{self.bytes / 1e6:.1f} MB instead of {self.stock_bytes / 1e6:.1f}"
        )


class CacheUse(Value):
    """What was expected of the cache, what came, and why not.

    ``expected_tokens`` is the longest prefix that an earlier request of this handle left cacheable; ``reason`` is set
    when fewer tokens came from the cache than that. ``cached_tokens`` are what the provider counted. Where it counts
    none (Ollama), ``estimated`` is True and ``estimated_tokens`` are inferred from the time that reading the prompt
    took: an estimate, never part of the ledger's cached tokens. ``attended`` is set where attention was computed in
    place.
    """

    kind: Literal["none", "auto", "breakpoints", "slots", "tensors"] = "none"
    expected_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    estimated_tokens: int = 0
    reason: str | None = None
    attended: Attended | None = None

    def __str__(self) -> str:
        came = f"about {self.estimated_tokens}" if self.estimated else str(self.cached_tokens)
        parts = [f"{came} tokens cached, {self.expected_tokens} expected"]
        parts += [part for part in (self.reason, self.attended and str(self.attended)) if part]
        return "; ".join(parts)


class TokenCount(Value):
    """How many tokens something has for a model. ``exact`` says whether the model's own tokenizer (or its vendor's
    counting endpoint) counted; else ``error`` is the relative error that earlier estimates for this model had, as the
    root of their mean square, None where none was seen yet."""

    tokens: int
    exact: bool
    error: float | None = None

    def __str__(self) -> str:
        if self.exact:
            return f"{self.tokens} tokens"
        off = "" if self.error is None else f" (such estimates were {self.error:.0%} off)"
        return f"about {self.tokens} tokens{off}"


class TurnFacts(Value):
    """What a request was made of, and what that cost. Sizes are tokens, with what the chat format adds.

    ``core`` are the ids of the core block's records, ``used`` those of them that the search named for this turn.
    ``start`` is the turn that the verbatim history begins at, and ``folded`` so many turns of the session are out of
    sight; ``kept``: what was recalled stays in the history. ``decided`` says what was done to the core, and why.
    ``cost`` was paid for the prompt, ``bare`` would have been with nothing cached, in ``unit``: CPU-seconds of this
    machine or dollars; None where neither is known.
    """

    system_tokens: int = 0
    core_tokens: int = 0
    history_tokens: int = 0
    recalled_tokens: int = 0
    message_tokens: int = 0
    core: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    start: str | None = None
    folded: int = 0
    kept: bool = False
    decided: str = ""
    unit: Literal["seconds", "dollars"] = "seconds"
    cost: float | None = None
    bare: float | None = None

    def __str__(self) -> str:
        lines = [
            f"system {self.system_tokens} tokens",
            f"core {self.core_tokens} ({len(self.core)} records, {len(self.used)} of them named by the search)",
            f"history {self.history_tokens} ({self.folded} turns folded away)",
            f"recalled {self.recalled_tokens}{' (stays in the history)' * self.kept}",
            f"message {self.message_tokens}",
        ]
        said = [" | ".join(lines)]
        if self.cost is not None:
            bare = "" if self.bare is None else f", {self._amount(self.bare)} with nothing cached"
            said.append(f"the prompt cost {self._amount(self.cost)}{bare}")
        return "\n".join([*said, self.decided] if self.decided else said)

    def _amount(self, value: float) -> str:
        return f"${value:.4g}" if self.unit == "dollars" else f"{value:.3g} CPU-s"


class Reply(Value):
    """What ``chat`` returns. ``records`` are the ids under which this turn was remembered (empty if it was not).
    ``loras`` are the names of the LoRA versions that acted on this answer; ``facts`` say what its request was made of.

    ``parsed`` is the answer as the ``schema`` that was asked for says: an object of its class, or JSON values.
    """

    text: str
    usage: Usage = Usage()
    recalled: list[Hit] = Field(default=[])
    cache: CacheUse = CacheUse()
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    model: str = ""
    records: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    parsed: Any = None
    facts: TurnFacts | None = None

    def __str__(self) -> str:
        return self.text

    def explain(self) -> str:
        """Why this prompt was as it was: what stood in it, what was recalled for which reason, what the cache did."""
        lines = [f"{self.model}: {self.usage}"]
        lines += [] if self.facts is None else [str(self.facts)]
        lines += [f"cache ({self.cache.kind}): {self.cache}"]
        lines += [f"answered with {name}" for name in self.loras]
        for hit in self.recalled:
            why = ", ".join(f"{name} {part:+.2f}" for name, part in hit.why.items())
            where = "in the core" if self.facts and hit.record.id in self.facts.core else "recalled"
            lines.append(f"{where} {hit.score:.2f} [{hit.record.id}] {hit.passage!r}" + (f" ({why})" if why else ""))
        return "\n".join(lines)


class Erasure(Value):
    """The receipt of ``forget``: what was removed, and where. With ``dry_run`` nothing was removed yet.

    ``replies`` are answers to one of these records, or written with one recalled, in the core or learnt by a LoRA
    version that acted on it. They are memories of their own and were kept; forget them by these ids if they repeat what
    should be gone. ``saved`` are folders that `activation.save` wrote and that hold states of them: yours to delete.
    ``hosted`` says, per provider that saw one of the records, what it may still hold and until when.
    """

    dry_run: bool = False
    records: list[str] = Field(default=[])
    versions: int = Field(default=0, description="rows of older versions of these records")
    vectors: int = 0
    pages: list[str] = Field(default=[], description="keys of the KV pages made from these records, in hex")
    slots: list[str] = Field(default=[], description="files of a server's slots that were made from these records")
    cores: list[str] = Field(default=[], description="scopes whose core block held one of these records")
    loras: list[str] = Field(
        default=[],
        description="digests of LoRA versions that learnt one of these records, now retired; those that were active "
        "are queued to be trained again without it, `parametric.receipts()` has the proof",
    )
    saved: list[str] = Field(default=[], description="folders of saved KV pages that still hold these records' states")
    replies: list[str] = Field(default=[])
    hosted: list[str] = Field(default=[])

    def __str__(self) -> str:
        verb = "would forget" if self.dry_run else "forgot"
        lines = [
            f"{verb} {len(self.records)} records ({self.versions} older versions, {self.vectors} vectors), "
            f"{len(self.pages)} KV pages, {len(self.cores)} core blocks, {len(self.loras)} LoRA versions"
            + (f", {len(self.slots)} saved slots" if self.slots else "")
        ]
        if self.replies:
            lines.append(f"  kept {len(self.replies)} replies written with them: {', '.join(self.replies)}")
        lines += [f"  saved KV pages in {folder} still hold them: delete that folder" for folder in self.saved]
        return "\n".join(lines + [f"  {note}" for note in self.hosted])


class Retraining(Value):
    """What became of a LoRA version that learnt a record which was forgotten, changed or ended: the proof of `retrain`.

    ``retired`` is its digest; it was out of use, its files deleted, before the call that changed the record returned.
    ``version`` is the digest of what took its place, trained anew from the records that remain: None where none remain,
    or where it is still ``queued`` or has ``failed`` (``note`` says why). ``forgotten`` are ids of records that the new
    one was not trained on, or on another text.

    Recalls are shares of questions answered with the old text, without context: ``base_recall`` by the base model,
    ``recall_before`` by the retired version (in its gate), ``recall_after`` by the new one; ``others_before`` and
    ``others_after`` are the recall of the other facts. They are None where there was nothing to ask: questions about a
    forgotten record live only in the memory of the process that forgot it. What holds without them: the new weights
    were computed from the base model and the records in its manifest, and from nothing else.
    """

    retired: str
    state: Literal["queued", "done", "failed"]
    version: str | None = None
    forgotten: tuple[str, ...] = ()
    kept: int = Field(default=0, description="records that the new version learnt again")
    asked: int = Field(default=0, description="questions about the forgotten records")
    base_recall: float | None = None
    recall_before: float | None = None
    recall_after: float | None = None
    others_before: float | None = None
    others_after: float | None = None
    cpu_seconds: float = 0.0
    note: str | None = None

    def __str__(self) -> str:
        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.0%}"

        if self.state == "queued":
            return f"lora-{self.retired[:12]} is retired and waits for retrain(), without {len(self.forgotten)} records"
        became = f"lora-{self.version[:12]}" if self.version else "no version"
        return (
            f"lora-{self.retired[:12]} -> {became} ({self.state}), without {len(self.forgotten)} records, {self.kept} "
            f"kept: recall of what is gone {share(self.recall_before)} -> {share(self.recall_after)} (base "
            f"{share(self.base_recall)}), of the others {share(self.others_before)} -> {share(self.others_after)}, "
            f"{self.cpu_seconds:.0f} CPU-seconds" + (f"; {self.note}" if self.note else "")
        )


class Compaction(Value):
    """What ``compact`` did: bytes on disk by kind of memory before and after. ``emptied`` is False where a reader of
    another process kept the database's log, so that deleted bytes may be in it until the next open."""

    before: dict[str, int]
    after: dict[str, int]
    emptied: bool = True

    def __str__(self) -> str:
        parts = [f"{kind}: {size:,} -> {self.after.get(kind, 0):,} bytes" for kind, size in self.before.items()]
        return "\n".join(parts if self.emptied else [*parts, "the log is still read by another process"])


class Context(Value):
    """A block of records ready to be put into a prompt: ``str()`` of it, or ``.text``. ``tokens`` is its length."""

    text: str
    tokens: int
    hits: list[Hit] = Field(default=[])

    def __str__(self) -> str:
        return self.text


class Extraction(Value):
    """What a run of ``plaintext.extract`` did. ``records`` are what was noted, new or with one more source.

    ``read`` turns were read, ``nothing`` of them hold nothing worth noting; ``failed`` are tried again by a later run,
    ``refused`` are not; ``left`` were not reached.
    """

    records: list[Record] = Field(default=[])
    read: int = 0
    nothing: int = 0
    failed: int = 0
    refused: int = 0
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.read} turns read, {len(self.records)} records noted ({self.nothing} with nothing to note, "
            f"{self.failed} failed, {self.refused} refused, {self.left} left)"
        )


class Reconciliation(Value):
    """What a run of ``plaintext.reconcile`` did: pairs ``asked`` about, and a record for each ``conflict`` found.

    ``failed`` pairs are asked about again by a later run; ``left`` were not reached.
    """

    conflicts: list[Record] = Field(default=[])
    asked: int = 0
    failed: int = 0
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.asked} pairs asked about, {len(self.conflicts)} conflicts ({self.failed} failed, {self.left} left)"
        )


class Verification(Value):
    """What ``verify`` found. Each problem names the damaged thing. ``slots`` are the saved slots of servers.

    ``facts`` are no problems: how vectors are searched, and the recall that an index too large to be exact costs.
    """

    records: int
    pages: int
    loras: int
    slots: int = 0
    problems: list[str] = Field(default=[])
    facts: list[str] = Field(default=[])

    @property
    def ok(self) -> bool:
        """True if nothing is damaged."""
        return not self.problems

    def __str__(self) -> str:
        held = f"{self.records} records, {self.pages} KV pages, {self.loras} LoRA versions"
        held += f", {self.slots} saved slots" if self.slots else ""
        state = "all sound" if self.ok else f"{len(self.problems)} problems"
        return "\n".join([f"{held}: {state}", *self.problems, *self.facts])

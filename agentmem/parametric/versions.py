"""A LoRA version as a value, and how it stands in its row: scope columns, manifest, the list of what is active.

Knows the columns of the tables ``loras`` and ``activations``; never touches a file or a tensor.
"""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from agentmem.types import LEVELS, Scope, Value

from . import plots
from .gate import GateReport, Thresholds, failures
from .steps import Point

__all__ = [
    "LoraVersion",
    "chunks",
    "columns",
    "judged_alike",
    "manifest_of",
    "scope_of",
    "unfit_always",
    "upwards",
    "version_of",
    "visible",
]

#: Fields of a version that say how it stands now, not what it is: never part of its manifest.
_PASSING = {"active", "shards"}


class LoraVersion(Value):
    """One trained LoRA. ``name`` is ``lora-`` and the first twelve digits of ``digest``, the SHA-256 of its two files.

    ``records`` are the ids of the records that it learnt, ``left_out`` those of the same call that it did not, with
    why. ``base`` is the model's name and ``identity`` the digest of its weights. ``parents`` are the digests of the
    versions whose place it takes. ``curve`` has the points that training measured on its way; ``reproducible`` says
    whether the same records, seed and library versions give the same weights. ``activated`` are the token ids from
    which on it acts (an activated LoRA, arXiv 2504.12397), empty for one that acts on all tokens.

    ``active``: the scope that was asked about answers with it. ``state`` is ``failed`` where the gate was not passed
    and ``retired`` where a record that it learnt was forgotten or changed (its files are gone). ``shards`` are the
    names of all versions that the same call of ``train`` made, itself included: one learns ``lora_shard`` records at
    most.
    """

    name: str
    digest: str
    scope: Scope
    created: dt.datetime
    records: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    base: str
    identity: str
    gate: GateReport
    state: Literal["ready", "failed", "retired"]
    active: bool = False
    shards: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    bytes: int
    cpu_seconds: float
    seconds: float = 0.0
    seed: int = 0
    recipe: dict[str, Any] = Field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    reproducible: bool = True
    activated: tuple[int, ...] = ()

    def __str__(self) -> str:
        mark = " (active)" if self.active else ""
        others = f", one of {len(self.shards)} shards" if len(self.shards) > 1 else ""
        return (
            f"{self.name}{mark}: {self.state}, {len(self.records)} records of {self.scope}{others}, on {self.base}, "
            f"{self.bytes / 1e6:.2f} MB, {self.cpu_seconds:.0f} CPU-seconds; gate {self.gate}"
            + (f"; {learnt}" if (learnt := plots.line(self.curve)) else "")
        )

    def _repr_html_(self) -> str:
        return plots.body(self)


def manifest_of(version: LoraVersion, contents: dict[str, str], run: str = "") -> str:
    """The manifest as JSON: the version, the digests of the records' contents, and the key of the run that made it."""
    fields = version.model_dump(mode="json", exclude=_PASSING)
    return json.dumps({**fields, "contents": contents, "run": run}, sort_keys=True)


def version_of(row: sqlite3.Row, active: Collection[str] = ()) -> LoraVersion:
    """The version of a row of ``loras``; ``active`` are the digests that the scope which asks answers with."""
    fields = json.loads(row["manifest"])
    for name in ("contents", "run"):
        fields.pop(name, None)
    fields.update(state=row["state"], active=row["digest"] in active)
    return LoraVersion.model_validate(fields)


def unfit_always(version: LoraVersion) -> tuple[str, ...]:
    """Why a version that passed its gate would have failed it, were it to act on every request of its scope."""
    if version.state != "ready":  # one that failed was forced: somebody knows
        return ()
    return failures(version.gate.model_copy(update={"gated_intrusion": None}))


def judged_alike(report: GateReport, thresholds: Thresholds, *, filtered: bool) -> bool:
    """Whether a gate measured against these thresholds, and for acting only on what concerns a version or always."""
    return report.thresholds == thresholds and (report.gated_intrusion is not None) == filtered


def upwards(scope: Scope) -> Iterator[Scope]:
    """The scope itself, then without its session, agent, user and tenant in turn."""
    yield scope
    for level in reversed(LEVELS):
        if getattr(scope, level) is not None:
            scope = scope.model_copy(update={level: None})
            yield scope


def visible(version: Scope, scope: Scope) -> bool:
    """Whether a handle of ``scope`` sees a version of that scope: its own, beneath it, or of a level above."""
    return version.within(scope) or scope.within(version)


def scope_of(row: sqlite3.Row) -> Scope:
    """The scope in a row's columns."""
    return Scope(**{level: row[level] or None for level in LEVELS})


def columns(scope: Scope) -> tuple[str, ...]:
    """A scope as the values of its columns; an unset level is ''."""
    return tuple(value or "" for _, value in scope.levels())


def chunks(values: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    """Parts of a list that fit into one statement's parameters."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])

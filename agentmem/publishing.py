"""LoRA versions at engines that run elsewhere: published under a name that holds their digest, and taken back.

Knows the registry, which engine was given which version, and what engines can do; never how one is talked to (that is
its adapter's, `TakesLoras`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import provider as providers
from .engine import Engine
from .errors import AgentMemError, ConfigError, InvalidInput, NotFound, Rejected, TrainingError
from .loras import PUBLISHED, LoraRef, TakesLoras, as_one
from .plaintext.drafts import shown
from .provider import Provider
from .types import Scope, Value

if TYPE_CHECKING:
    from .parametric.registry import LoraVersion

__all__ = ["Publication", "base_config", "publish", "unpublish", "withdraw"]

_log = logging.getLogger("agentmem")

#: Engines that can serve a LoRA, for messages; what each can do is in its `Capabilities`.
LOCAL = ("local", "llamacpp", "vllm", "ollama")
#: What a receipt waits for an engine: it may be down.
WITHDRAWING: dict[str, Any] = {"timeout_s": 10.0, "max_retries": 0}


class Publication(Value):
    """A LoRA version, or the sum of several, at an engine: what it is called there, and what is left to do, if
    anything, before it is served. ``file`` is what the engine reads; None where it took a copy."""

    versions: tuple[str, ...]
    to: str
    served: str
    ready: bool = True
    to_do: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        state = "served" if self.ready else f"not served yet: {self.to_do}"
        return f"{' + '.join(self.versions)} at {self.to} as {self.served}: {state}"


def publish(
    engine: Engine,
    scope: Scope,
    version: str | LoraVersion | Sequence[str | LoraVersion] | None = None,
    to: str | None = None,
) -> Publication:
    """Give this version to the engine ``to`` ("scheme:model"; default: the memory's own model); see
    `Parametric.publish`. Several versions (None: all that are active in this scope) are published as their exact sum.
    """
    if isinstance(to, str) and not providers.may_take_loras(to):
        raise ConfigError(_no_place(providers.public_name(to), "none"))
    versions = _chosen(engine, scope, version)
    with _reached(engine, to) as (target, provider):
        facts = provider.capabilities
        if not isinstance(provider, TakesLoras) or not facts.loras:
            raise ConfigError(_no_place(target, facts.lora_loading))
        refs = [engine.registry.ref(one) for one in versions]
        if not facts.activated_loras and any(ref.activated for ref in refs):
            raise ConfigError(
                f"{target} serves no activated LoRA versions: train one with the setting lora_activated = false for it"
            )
        served = as_one(refs).served_name
        # An engine that takes a copy into its own store reads a passing file; others may be reading one of that name.
        copied = facts.lora_loading == "model"
        folder = engine.folder / PUBLISHED / (f".{served}-{uuid.uuid4().hex}" if copied else "")
        # Before a file is written and the engine is told, so that nothing of it can be anywhere unknown to `withdraw`.
        new = _note(engine, versions, target, served)
        asked = False
        try:
            file = _written(engine, versions, refs, facts.lora_format, folder)
            asked = True
            published = provider.publish_lora(served, file)
        except BaseException as error:
            # Another error may hide that the engine has it; and one that it was given before, it has still.
            if new and (not asked or isinstance(error, (ConfigError, InvalidInput, Rejected))):
                _spare(engine, target, served)
                _forget_row(engine, target, served)
            raise
        finally:
            if copied:
                shutil.rmtree(folder, ignore_errors=True)
        gone = [one.name for one in versions if engine.registry.get(one.digest, scope).state == "retired"]
        if gone:  # forgotten meanwhile, before the engine knew it
            told = "; ".join(withdraw(engine, [one.digest for one in versions]))
            raise TrainingError(f"{', '.join(gone)} was retired while it was published: taken back. {told}".strip())
    return Publication(
        versions=tuple(one.name for one in versions),
        to=target,
        served=served,
        ready=published.ready,
        to_do=published.to_do,
        file=None if copied else str(file),
    )


def unpublish(engine: Engine, scope: Scope, version: str | LoraVersion, to: str | None = None) -> tuple[str, ...]:
    """Take this version, and sums that hold it, back from the engine ``to`` (None: from all that were given it);
    returns the names that are gone there. Raises `ProviderError` where one stays."""
    found = engine.registry.get(version, scope)
    wanted = None if to is None else providers.public_name(to)
    rows = [row for row in _rows(engine, [found.digest]) if wanted in (None, row[0])]
    if not rows:
        raise NotFound(f"{found.name} was not published{'' if wanted is None else f' to {wanted}'}")
    for target, served in rows:
        _taken_back(engine, target, served, to=to)
    return tuple(served for _, served in rows)


def withdraw(engine: Engine, digests: Sequence[str]) -> list[str]:
    """Take retired versions back from every engine that was given them; returns a sentence for each that may still
    answer with one. What fails is tried again at the next call. Never raises for an engine that can't be reached."""
    told: list[str] = []
    for target, served in _rows(engine, [*digests, *_retired(engine)]):
        try:
            _taken_back(engine, target, served, **WITHDRAWING)
        except AgentMemError as error:
            told.append(f"{target} may still answer with the LoRA version {served}, which learnt it: {error}")
            _log.warning("%s", told[-1])
            _remove(engine, served)
    return told


def base_config(engine: Engine, version: LoraVersion) -> Any:
    """The transformers configuration of the base that this version was trained on; loads that model if it must."""
    own = engine.provider
    if own is not None and own.capabilities.trains and own.tensors().identity.hex() == version.identity:
        return own.tensors().model.config
    scheme, _ = providers.split_name(version.base)
    base = providers.load(version.base, engine.settings.providers.get(scheme, {}))
    try:
        tensors = base.tensors()
        if tensors.identity.hex() != version.identity:
            raise TrainingError(
                f"{version.name} was trained on {version.base} as it was then; that model has changed: train it again"
            )
        return tensors.model.config
    finally:
        base.close()


def _chosen(engine: Engine, scope: Scope, version: Any) -> list[LoraVersion]:
    registry = engine.registry
    if version is None:
        found = list(registry.active(scope))
        if not found:
            raise InvalidInput(f"no LoRA version is active in {scope}: name the one to publish")
    else:
        several: Sequence[Any] = (version,)
        if isinstance(version, Sequence) and not isinstance(version, str):
            several = version
        found = [registry.get(one, scope) for one in several]
        if not found:
            raise InvalidInput("no LoRA version to publish: name one")
    for one in found:
        if one.state == "retired":
            raise TrainingError(f"{one.name} is retired, a record it learnt is gone: train a new version")
        if one.state == "failed" and not one.active:
            raise TrainingError(f"{one.name} did not pass its gate ({one.gate}): activate(force=True) it first")
    if len({one.identity for one in found}) > 1:
        raise InvalidInput("these LoRA versions were trained on several bases: publish each by itself")
    return found


@contextlib.contextmanager
def _reached(engine: Engine, to: str | None, **settings: Any) -> Generator[tuple[str, Provider]]:
    """The engine's name, without any key in it, and its provider: the memory's own, or one that is closed at the
    end."""
    if to is None:
        yield providers.public_name(engine.chat_provider().name), engine.chat_provider()
        return
    name: Any = to
    if not isinstance(name, str) or not name.strip():
        raise InvalidInput(f'to is {shown(to)}: name an engine as "ollama:llama3.2", "vllm:http://host:8000", ...')
    scheme, _ = providers.split_name(to)
    provider = providers.load(to, {**engine.settings.providers.get(scheme, {}), **settings})
    try:
        yield providers.public_name(to), provider
    finally:
        provider.close()


def _configured(engine: Engine, target: str) -> str:
    """What is stored of an engine's name, with the user and password of an address as the settings know them."""
    scheme, _ = providers.split_name(target)
    base = engine.settings.providers.get(scheme, {}).get("base_url")
    for name in (engine.settings.model, f"{scheme}:{base}" if isinstance(base, str) else None):
        if name and "://" in name and providers.public_name(name).removesuffix("/v1") == target.removesuffix("/v1"):
            return name
    return target


def _no_place(target: str, loading: str) -> str:
    if loading == "process":
        return f"{target} reads LoRA versions from the memory's folder by itself: activate one instead"
    return f"{target} has no place for a LoRA: parametric memory lives on engines of your own ({', '.join(LOCAL)})"


def _written(engine: Engine, versions: Sequence[LoraVersion], refs: Sequence[LoraRef], form: str, folder: Path) -> Path:
    """What the engine is to read: a version's own folder, or a file made for it in ``folder``."""
    from .parametric.export import export_gguf, export_peft

    if form == "gguf":
        return export_gguf(refs, folder, base_config(engine, versions[0]))
    if len(refs) == 1:
        return Path(refs[0].path)
    served = as_one(refs).served_name
    shutil.rmtree(folder / served, ignore_errors=True)  # left of an earlier try; the new one has the same bytes
    return export_peft(refs, folder / served)


def _spare(engine: Engine, target: str, served: str) -> None:
    """Delete the files that were made for this engine, unless another one reads them too."""
    others = "SELECT 1 FROM published WHERE served = ? AND target != ?"
    if not engine.database.query(others, (served, target)):
        _remove(engine, served)


def _remove(engine: Engine, served: str) -> None:
    """The files made for engines, never a version's own."""
    folder = engine.folder / PUBLISHED
    (folder / f"{served}.gguf").unlink(missing_ok=True)
    for left in (folder / served, *folder.glob(f".{served}*")):  # the latter of a process that died over it
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _taken_back(engine: Engine, target: str, served: str, *, to: str | None = None, **settings: Any) -> None:
    with _reached(engine, to or _configured(engine, target), **settings) as (_, provider):
        if isinstance(provider, TakesLoras):
            provider.unpublish_lora(served)
    _spare(engine, target, served)
    _forget_row(engine, target, served)


# ---- which engine was given what


def _note(engine: Engine, versions: Sequence[LoraVersion], target: str, served: str) -> bool:
    """Write down that this engine is given these; False where it was before."""
    with engine.database.write() as connection:
        known = (target, served) in _rows(engine, [one.digest for one in versions])
        connection.executemany(
            "INSERT OR REPLACE INTO published (digest, target, served, at) VALUES (?, ?, ?, ?)",
            [(one.digest, target, served, engine.clock()) for one in versions],
        )
    return not known


def _forget_row(engine: Engine, target: str, served: str) -> None:
    with engine.database.write() as connection:
        connection.execute("DELETE FROM published WHERE target = ? AND served = ?", (target, served))


def _rows(engine: Engine, digests: Sequence[str]) -> list[tuple[str, str]]:
    found = {
        (str(row["target"]), str(row["served"]))
        for digest in dict.fromkeys(digests)
        for row in engine.database.query("SELECT target, served FROM published WHERE digest = ?", (digest,))
    }
    return sorted(found)


def _retired(engine: Engine) -> list[str]:
    rows = engine.database.query(
        "SELECT published.digest FROM published LEFT JOIN loras ON loras.digest = published.digest "
        "WHERE loras.state IS NULL OR loras.state = 'retired'"
    )
    return [str(row["digest"]) for row in rows]

"""Which LoRAs of a llama-server act on a request: ours are known by the digest in their file's name.

The server takes adapters when it is started, and keeps the KV states of its slots when its own scales are changed: so
every request names the scale of every adapter. Pure: of what ``/lora-adapters`` told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from agentmem.loras import LoraRef, as_one

__all__ = ["Told", "names", "scales", "served"]

#: What ``GET /lora-adapters`` says: a list of ``{"id", "path", "scale", ...}``.
Told = Sequence[Mapping[str, Any]]

#: How a file's name ends that one of our versions was exported to (`agentmem.loras.served_name`).
OURS = re.compile(r"-[0-9a-f]{16}$")


def names(told: Told) -> dict[str, int]:
    """The server's adapters: the names of their files, without the ending, and their ids."""
    return {PurePath(str(one["path"])).stem: int(one["id"]) for one in told}


def served(told: Told, loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    """Which of these versions the server can answer one request with: all if it has their sum, else those it has.

    It takes one activated LoRA at a time and none beside others.
    """
    known = names(told)
    if len(loras) > 1 and as_one(loras).served_name in known:
        return tuple(loras)
    found = [lora for lora in loras if lora.served_name in known]
    if found and found[0].activated:
        return (found[0],)
    return tuple(lora for lora in found if not lora.activated)


def scales(told: Told, loras: Sequence[LoraRef], given: Any = None) -> dict[int, float]:
    """The scale of every adapter of the server for a request with these versions.

    ``given`` is the user's own list (the option ``lora``), which is taken as it is. Adapters that are not ours keep the
    scale that the server has for them; ours act only where they are asked for.
    """
    if given is not None:
        return {int(one["id"]): float(one["scale"]) for one in given}
    known = names(told)
    wanted = {known[lora.served_name]: lora.scale for lora in served(told, loras) if lora.served_name in known}
    if len(loras) > 1 and (whole := known.get(as_one(loras).served_name)) is not None:
        wanted = {whole: 1.0}
    return {
        number: wanted.get(number, 0.0 if OURS.search(name) else float(one["scale"]))
        for (name, number), one in zip(known.items(), told, strict=True)
    }

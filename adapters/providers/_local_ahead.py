"""What the next prompt will hold of an answer, computed as soon as the answer is out and not when the next turn waits.

Knows segments and prompts; how states are computed and kept is `Run`'s (_local_run.py). An answer's own states,
made token by token, have bits of their own: here its text is prefilled like any other.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from agentmem.provider import Request
from agentmem.types import Message, Segment

__all__ = ["following"]


def following(request: Request, answer: str) -> Request | None:
    """What the next turn's prompt will begin with, as a request for prefill alone: the stable segments and the answer.
    None where this turn's message is not among them, so that the next prompt will go on in another way, and where the
    answer is kept under no id that forgetting could find its pages by."""
    stable = list(itertools.takewhile(lambda segment: segment.stable, request.segments))
    if not answer.strip() or not request.answer or not any(segment.name == "turn" for segment in stable):
        return None
    said = Segment(
        name="history", messages=(Message(role="assistant", content=answer, records=(request.answer,)),), stable=True
    )
    return replace(
        request,
        segments=(*stable, said),
        recalled=(),
        options=replace(request.options, max_tokens=0, stop=(), schema=None),
    )

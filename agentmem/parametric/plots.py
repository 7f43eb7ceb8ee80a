"""How a LoRA version learnt, drawn: known tokens, loss, drift and KL over its steps, as SVG and as a line of text.

Knows what the measures mean; figures.py draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentmem.figures import STYLE, Curve, figure, panels, table

from .steps import Point

if TYPE_CHECKING:
    from .versions import LoraVersion

__all__ = ["body", "curves", "line"]

_BLOCKS = "▁▂▃▄▅▆▇█"
#: Characters of a line's plot at most.
_WIDE = 24


def curves(points: Sequence[Point]) -> tuple[Curve, ...]:
    """The four measures of a run: the share of answer tokens that are surely recalled (above probability 0.5), the loss
    of all of them in nats, the rise of the perplexity on unrelated text, the KL to the base on unrelated questions."""
    return (
        Curve(name="known: answer tokens above p 0.5", points=tuple((p.step, p.known) for p in points), share=True),
        Curve(name="loss, nats a token", points=tuple((p.step, p.loss) for p in points)),
        Curve(
            name="drift: rise of the perplexity", points=tuple((p.step, p.drift) for p in points if p.drift is not None)
        ),
        Curve(name="KL to the base, nats a token", points=tuple((p.step, p.kl) for p in points if p.kl is not None)),
    )


def line(points: Sequence[Point]) -> str:
    """A run in one line of text: its share of known tokens as blocks, and where its measures ended; "" without any."""
    if not points:
        return ""
    first, last = points[0], points[-1]
    every = max(1, -(-len(points) // _WIDE))
    shown = [*points[:-1:every], last]
    blocks = "".join(_BLOCKS[min(max(round(p.known * 7), 0), 7)] for p in shown)
    parts = [f"known {blocks} {last.known:.0%}", f"loss {first.loss:.2f} to {last.loss:.2f}"]
    if (drift := next((p.drift for p in reversed(points) if p.drift is not None), None)) is not None:
        parts.append(f"drift {drift:+.1%} on a passage of its own")  # the gate reads others
    if (kl := next((p.kl for p in reversed(points) if p.kl is not None), None)) is not None:
        parts.append(f"KL {kl:.3f}")
    return f"{', '.join(parts)} after {last.step} steps"


def body(version: LoraVersion) -> str:
    """The version as an element for a page or a notebook: its plots, what the gate measured, how it came about."""
    gate = version.gate
    measured = [(name, value) for name, value in gate if isinstance(value, float | int) and not isinstance(value, bool)]
    facts = [
        ("state", "active" if version.active else version.state),
        ("records", len(version.records)),
        ("base", version.base),
        ("bytes", version.bytes),
        ("CPU-seconds", version.cpu_seconds),
        ("seed", version.seed),
    ]
    plot = panels(f"how {version.name} learnt", curves(version.curve)) if version.curve else ""
    told = table(("version", ""), facts) + table(("gate " + ("passed" if gate.passed else "failed"), ""), measured)
    if gate.failed:
        told += table(("why the gate failed",), [(why,) for why in gate.failed])
    if version.left_out:
        told += table(("record that it did not learn", "why"), version.left_out)
    return f'<div class="agentmem"><style>{STYLE}</style>{figure(version.name, plot, told)}</div>'

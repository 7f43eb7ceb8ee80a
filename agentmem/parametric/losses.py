"""The two losses of a step, with their gradients: of answers that are to be learnt, of answers that must not move.

Knows the states that enter the model's head and nothing else. A vocabulary is wide (49,152 logits a token for a state
of 576 numbers), so logits live only for a few rows at a time, in the cache, and are overwritten by their gradient
(as the fused losses of Liger, arXiv 2410.10989, do on GPUs): measured 3 times cheaper than autograd over whole logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["answer_loss", "divergence"]

#: Rows whose float32 logits are held at once.
_ROWS = 8
#: Rows of one matrix product with the head: enough to be fast, few enough to be small (64 MB at 128k tokens).
_BLOCK = 256


def answer_loss(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, gradient): the loss in nats of each target, and the gradient of the sum over those not yet known.

    ``hidden`` [rows, width] enters ``head``; a target whose loss is below ``threshold`` counts as known and gives no
    gradient (arXiv 2605.30260). The gradient is with respect to ``hidden``, in its dtype.
    """
    import torch

    weight = head.weight
    losses = torch.empty(len(targets), device=hidden.device)
    gradient = torch.zeros_like(hidden)
    with torch.no_grad():
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(targets)))
            logits, wanted = head(hidden[block]), targets[block]
            for at in range(0, len(logits), _ROWS):
                rows = logits[at : at + _ROWS].float()
                chosen = wanted[at : at + _ROWS, None]
                log_sum = rows.logsumexp(-1, keepdim=True)
                here = log_sum - rows.gather(1, chosen)
                losses[start + at : start + at + len(rows)] = here[:, 0]
                rows = rows.sub_(log_sum).exp_()
                rows.scatter_add_(1, chosen, torch.full_like(here, -1.0))
                logits[at : at + _ROWS] = rows
            unknown = (losses[block] >= threshold).nonzero()[:, 0]
            if len(unknown):
                gradient[start + unknown] = logits[unknown] @ weight
    return losses, gradient


def divergence(
    hidden: torch.Tensor, before: torch.Tensor, head: Any, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergences, gradient): KL in both directions, per row, between what ``hidden`` and ``before`` predict.

    KL(base || here) alone hardly minds a learnt fact beside the base's own answers, KL(here || base) alone hardly minds
    a lost one. Rows below ``threshold`` give no gradient. It is that of the sum over the rows, with respect to
    ``hidden``, in its dtype.
    """
    import torch

    found = torch.empty(len(hidden), device=hidden.device)
    gradient = torch.zeros_like(hidden)
    with torch.no_grad():
        for start in range(0, len(hidden), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(hidden)))
            logits, base = head(hidden[block]), head(before[block])
            for at in range(0, len(logits), _ROWS):
                p_log = logits[at : at + _ROWS].float().log_softmax(-1)
                q_log = base[at : at + _ROWS].float().log_softmax(-1)
                p, q = p_log.exp(), q_log.exp()
                ratio = p_log.sub_(q_log)
                forward = (p * ratio).sum(-1, keepdim=True)
                found[start + at : start + at + len(p)] = (forward - (q * ratio).sum(-1, keepdim=True))[:, 0]
                # d KL(p || q) = p (log p/q - KL(p || q)); d KL(q || p) = p - q.
                logits[at : at + _ROWS] = ratio.sub_(forward).add_(1.0).mul_(p).sub_(q)
            moved = (found[block] >= threshold).nonzero()[:, 0]
            if len(moved):
                gradient[start + moved] = logits[moved] @ head.weight
    return found, gradient

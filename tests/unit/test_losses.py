"""The losses of training and their gradients against autograd over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from agentmem.parametric import losses
from agentmem.parametric.losses import answer_loss, divergence


@pytest.fixture
def head() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(24, 300, bias=False).requires_grad_(requires_grad=False)


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_the_answer_loss_and_its_gradient_are_those_of_cross_entropy(
    count: int, head: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK", 16)
    hidden, targets = rows(count, 1).requires_grad_(), torch.arange(count) * 7 % 300
    targets[0] = int(head(hidden)[0].argmax())
    theirs = functional.cross_entropy(head(hidden), targets, reduction="none")
    threshold = float(theirs.detach().median()) - 1e-4
    theirs[theirs >= threshold].sum().backward()  # type: ignore[no-untyped-call]
    found, gradient = answer_loss(hidden.detach(), head, targets, threshold)
    assert torch.allclose(found, theirs, atol=1e-5)
    assert hidden.grad is not None
    assert torch.allclose(gradient, hidden.grad, atol=1e-5)
    assert not answer_loss(hidden.detach(), head, targets, 1e9)[1].any()


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_the_divergence_and_its_gradient_are_those_of_kl_in_both_directions(
    count: int, head: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK", 16)
    hidden = rows(count, 1).requires_grad_()
    before = rows(count, 2) * 0.2 + hidden.detach()
    p, q = head(hidden).log_softmax(-1), head(before).log_softmax(-1)
    theirs = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    theirs = theirs + functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    threshold = float(theirs.detach().median()) - 1e-4
    theirs[theirs >= threshold].sum().backward()  # type: ignore[no-untyped-call]
    found, gradient = divergence(hidden.detach(), before, head, threshold)
    assert torch.allclose(found, theirs, rtol=1e-4, atol=1e-5)
    assert hidden.grad is not None
    assert torch.allclose(gradient, hidden.grad, atol=1e-4)


def test_what_has_not_moved_diverges_by_nothing(head: torch.nn.Linear) -> None:
    found, gradient = divergence(rows(5, 1), rows(5, 1), head)
    assert torch.equal(found, torch.zeros(5))
    assert float(gradient.abs().max()) < 1e-6

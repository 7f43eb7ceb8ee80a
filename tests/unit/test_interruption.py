"""Work on a model ends between two layers when its thread is asked to give way, and other threads pass."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from agentmem.errors import TrainingError
from agentmem.parametric.interruption import asking, giving_way, whole

torch = pytest.importorskip("torch")


def model(layers: int = 4) -> Any:
    """Layers that count their passes."""

    class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, seen: list[int], number: int) -> None:
            super().__init__()
            self.seen, self.number = seen, number

        def forward(self, x: Any) -> Any:
            self.seen.append(self.number)
            return x + 1

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.layers = torch.nn.ModuleList([Layer(self.seen, number) for number in range(layers)])

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


def test_a_pass_ends_before_the_layer_at_which_it_is_asked_to() -> None:
    net = model()
    with giving_way(lambda: len(net.seen) >= 2), asking(net), pytest.raises(TrainingError, match="somebody waits"):
        net(torch.zeros(1))
    assert net.seen == [0, 1]
    net(torch.zeros(1))  # nothing is left on the model
    assert net.seen == [0, 1, 0, 1, 2, 3]


def test_nothing_is_asked_of_a_thread_that_nobody_told_to_give_way() -> None:
    net = model()
    with asking(net):
        assert not any(layer._forward_pre_hooks for layer in net.layers)
        assert float(net(torch.zeros(1))) == 4


def test_a_step_that_must_be_whole_is() -> None:
    net = model()
    with giving_way(lambda: True), asking(net):
        with whole():
            assert float(net(torch.zeros(1))) == 4
        with pytest.raises(TrainingError):
            net(torch.zeros(1))


def test_other_threads_pass_unhindered() -> None:
    net = model()
    passed: list[float] = []
    with giving_way(lambda: True), asking(net):
        other = threading.Thread(target=lambda: passed.append(float(net(torch.zeros(1)))))
        other.start()
        other.join()
    assert passed == [4.0]


def test_a_model_without_a_list_of_layers_is_asked_as_a_whole() -> None:
    net = torch.nn.Linear(1, 1)
    with giving_way(lambda: True), asking(net), pytest.raises(TrainingError):
        net(torch.zeros(1))


def test_the_way_back_is_interrupted_too_and_a_whole_one_has_the_same_gradients() -> None:
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(4)])

    def loss() -> Any:
        x = torch.ones(2, 3, requires_grad=True)
        for layer in net.layers:
            x = layer(x)
        return x.sum()

    loss().backward()
    alone = [weight.grad.clone() for weight in net.parameters()]
    net.zero_grad()
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == fires

    fires = -1
    with giving_way(stop), asking(net):
        loss().backward()
    assert all(torch.equal(weight.grad, before) for weight, before in zip(net.parameters(), alone, strict=True))
    assert len(asked) == 8  # before each layer, and before its input's gradient is passed on
    asked.clear()
    fires = 6
    with giving_way(stop), asking(net):
        found = loss()
        with pytest.raises(TrainingError, match="somebody waits"):
            found.backward()

"""Advice on the width."""

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.records import Recommendation
from gradwatch.rules.chain import severity_of_factor


def advice(depth: int, width: int, seed: int = 0) -> list[Recommendation]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(depth):
        linear = nn.Linear(32 if index == 0 else width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_error="raise") as watch:
        model(torch.randn(32, 32)).square().mean().backward()
        optimizer.step()
    return [item for item in watch.recommendations if item.knob == "width"]


def test_twelve_layers_of_width_eight_are_told_their_width() -> None:
    (found,) = advice(12, 8)
    assert (found.severity, found.current, found.unit) == ("warning", 8, "units")
    assert found.proposed == 5 * 12 / 0.25
    assert found.direction == "up"


def test_the_width_that_is_proposed_is_wide_enough() -> None:
    assert advice(4, 5 * 4 * 4) == []


@pytest.mark.parametrize(("depth", "width"), [(2, 64), (10, 256), (1, 4)])
def test_silent_on_widths_that_suffice(depth: int, width: int) -> None:
    assert advice(depth, width) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_usual_narrow_net_is_worth_knowing_not_an_alarm(seed: int) -> None:
    (found,) = advice(6, 64, seed)
    assert found.severity == "info"


def test_severity_is_symmetric_in_growth_and_decay() -> None:
    for factor in (2.0, 20.0, 200.0):
        assert severity_of_factor(factor) == severity_of_factor(1 / factor)
    assert severity_of_factor(0.0) == "warning"

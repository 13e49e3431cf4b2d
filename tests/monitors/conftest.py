"""What tests of probing and deriving monitors share."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.capture.probe.view import ProbeView
from gradwatch.interfaces import Monitor
from gradwatch.records import DropoutInfo, Measurement, ModelInfo, StepInfo
from gradwatch.serialise import to_json

Batch = tuple[Tensor, Tensor]
Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]

MODEL_INFO = ModelInfo(dropouts=(DropoutInfo(name="drop", probability=0.5),))
SOURCES = ("4 micro-batches", "two halves of the batch", "the state of Adam")


class NoHostReads(TorchDispatchMode):
    """Fails where a number of a tensor is read on the host, which would stall a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    gradients = [None if item.grad is None else item.grad.clone() for item in model.parameters()]
    return copy.deepcopy(model.state_dict()), gradients, torch.get_rng_state()


@pytest.fixture(scope="session")
def probe() -> Probe:
    """Probes a model on a batch, and sees to it that nothing was changed or read on the host."""

    def run(
        monitor: Monitor,
        model: nn.Module,
        batch: Batch,
        facts: ModelInfo = ModelInfo(),  # noqa: B008 - immutable
        **view: Any,
    ) -> dict[str, Tensor]:
        batches = LastBatch()
        batches.tell(batch)
        given_view = ProbeView(
            **{
                "model": facts,
                "lr": 0.1,
                "objective": LossFunction(model, loss_fn, batches),
                **view,
            }
        )
        before = snapshot(model)
        with undisturbed(model), NoHostReads():  # type: ignore[no-untyped-call]
            found = monitor.probe(given_view)
        torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
        assert set(found) <= set(monitor.probed)
        assert not any(item.requires_grad or item.dim() for item in found.values())
        return dict(found)

    return run


@pytest.fixture(scope="session")
def step() -> Step:
    """The settings of a step of plain SGD."""

    def make(number: int = 0, **changes: Any) -> StepInfo:
        plain = StepInfo(
            step=number,
            lrs=(0.1,),
            optimizer="SGD",
            momentum=0.0,
            weight_decay=0.0,
            batch_size=32,
            grads_clipped=False,
            loss=1.0,
        )
        return replace(plain, **changes)

    return make


@pytest.fixture(scope="session")
def measured() -> Measured:
    """Measurements of the whole model, by metric."""

    def make(source: str = SOURCES[0], **values: float) -> list[Measurement]:
        return [
            Measurement(metric=metric, scope="model", step=0, value=value, source=source)
            for metric, value in values.items()
        ]

    return make


FLOATS = st.floats() | st.floats(0, 10)
STEPS = st.builds(
    StepInfo,
    step=st.integers(0, 10**6),
    lrs=st.lists(FLOATS, max_size=2).map(tuple),
    optimizer=st.sampled_from(["SGD", "AdamW", ""]),
    momentum=st.none() | FLOATS,
    dampening=st.none() | FLOATS,
    betas=st.none() | st.tuples(FLOATS, FLOATS),
    weight_decay=st.none() | FLOATS,
    batch_size=st.none() | st.integers(0, 2**40),
    grads_clipped=st.none() | st.booleans(),
    loss=st.none() | FLOATS,
    loss_scale=st.none() | FLOATS,
    skipped=st.booleans(),
)


def measurements(metrics: Sequence[str]) -> st.SearchStrategy[list[Measurement]]:
    one = st.builds(
        Measurement,
        metric=st.sampled_from(list(metrics)),
        scope=st.sampled_from(["model", "layer"]),
        step=st.just(0),
        value=FLOATS,
        source=st.sampled_from(SOURCES),
    )
    return st.lists(one, max_size=6)


@pytest.fixture(scope="session")
def survives() -> Check:
    """No values whatsoever make a monitor raise, and what it says has a name that it declares."""

    def check(make: Callable[[], Monitor], metrics: Sequence[str]) -> None:
        histories = st.lists(st.tuples(STEPS, measurements(metrics)), min_size=1, max_size=4)

        @given(histories, st.integers(1, 40))
        def run(history: list[tuple[StepInfo, list[Measurement]]], repeated: int) -> None:
            monitor = make()
            for _ in range(repeated):
                for info, values in history:
                    found = list(monitor.derive(info, values, MODEL_INFO))
                    assert {item.metric for item in found} <= set(monitor.metrics)
                    assert all(type(value) is float for item in found for value in _numbers(item))
            json.dumps(monitor.state_dict())

        run()

    return check


def _numbers(item: Measurement) -> list[float]:
    error = [] if item.standard_error is None else [item.standard_error]
    return [item.value, *error, *item.inputs.values()]


@pytest.fixture(scope="session")
def resumes() -> Check:
    """A monitor that was saved and loaded in the middle goes on as if nothing had happened."""

    def check(make: Callable[[], Monitor], metrics: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        values = (torch.rand(300, len(metrics), generator=generator) + 0.5).tolist()
        untouched, saved = make(), make()
        said = False
        for number, row in enumerate(values):
            info = StepInfo(
                step=3 * number, lrs=(0.1,), optimizer="SGD", batch_size=32, loss=row[0]
            )
            found = [
                Measurement(metric=metric, scope="model", step=0, value=value, source=SOURCES[0])
                for metric, value in zip(metrics, row, strict=True)
            ]
            if number == 170:
                state = json.loads(json.dumps(to_json(saved.state_dict()), allow_nan=False))
                saved = make()
                saved.load_state_dict(state)
            expected = list(untouched.derive(info, found, MODEL_INFO))
            got = list(saved.derive(info, found, MODEL_INFO))
            assert list(map(_shown, got)) == list(map(_shown, expected))
            said = said or (number > 170 and bool(expected))
        assert said

    return check


def _shown(item: Measurement) -> str:
    """As text, in which NaN equals NaN."""
    inputs: Mapping[str, float] = item.inputs
    return repr(replace(item, inputs=dict(sorted(inputs.items()))))

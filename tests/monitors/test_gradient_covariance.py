"""The covariance monitor against gradients of single examples, and through a whole watch."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.capture.view import MicrobatchCovariance, NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.gradient_covariance import GradientCovariance
from gradwatch.numerics.gram import covariance_estimate
from gradwatch.records import Measurement, ModelInfo, StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[Tensor, Tensor]
Probe = Callable[..., dict[str, Tensor]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]
METRICS = GradientCovariance.metrics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(count: int = 96, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, torch.randint(3, (count,), generator=generator)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def gradient(batch: Batch) -> Tensor:
    model = net()
    found = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    return torch.cat([item.reshape(-1) for item in found]).double()


def expected(batch: Batch, count: int, weights: Sequence[float] | None = None) -> list[float]:
    """By definition, from the gradients of equal parts, or of parts of these sizes."""
    sizes = [len(batch[0]) // count] * count if weights is None else [int(w) for w in weights]
    total = sum(sizes)
    parts = zip(batch[0][:total].split(sizes), batch[1][:total].split(sizes), strict=True)
    rows = torch.stack([gradient(part) * len(part[0]) / total for part in parts])
    found = covariance_estimate(rows, torch.tensor(sizes, dtype=torch.float64), float(total))
    return [*found[:2].tolist(), *found[2:].sqrt().tolist()]


def exact(batch: Batch) -> Tensor:
    """Eigenvalues of K over these examples."""
    each = torch.stack(
        [gradient((batch[0][[i]], batch[1][[i]])) for i in range(len(batch[0]))],
    )
    away = each - each.mean(0)
    eigenvalues: Tensor = torch.linalg.eigvalsh(away.T @ away / len(each))
    return eigenvalues


# --- The probe ---------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [4096, None])
@pytest.mark.parametrize(("examples", "count"), [(96, 25), (50, 25), (49, 24), (8, 4)])
def test_the_probe_cuts_the_batch(
    probe: Probe, examples: int, count: int, projection: int | None
) -> None:
    batch = data(examples)
    found = probe(GradientCovariance(projection=projection), net(), batch)
    trace, top, trace_error, top_error = expected(batch, count)
    values = [float(found[name]) for name in GradientCovariance.probed]
    assert values == pytest.approx([trace, top, trace_error**2, top_error**2], rel=1e-4)


def test_the_probe_is_right_on_average(probe: Probe) -> None:
    """Against the covariance of the gradients of single examples over all data."""
    inputs, targets = data(200)
    eigenvalues = exact((inputs, targets))
    truth = float(eigenvalues.sum()) * 200 / 199, float(eigenvalues[-1])
    generator = torch.Generator().manual_seed(0)
    monitor, found = GradientCovariance(), []
    for _ in range(40):
        rows = torch.randperm(200, generator=generator)[:100]
        values = probe(monitor, net(), (inputs[rows], targets[rows])).values()
        found.append([float(item) for item in values])
    mean, scatter = torch.tensor(found).mean(0), torch.tensor(found).std(0)
    assert abs(float(mean[0]) - truth[0]) < 3 * float(scatter[0]) / math.sqrt(40)
    assert float(mean[1]) == pytest.approx(truth[1], rel=0.2)


def test_a_small_projection_is_near(probe: Probe) -> None:
    batch = data()
    found = probe(GradientCovariance(projection=64), net(), batch)
    trace, top, *_ = expected(batch, 25)
    assert float(found["covariance_of_parts_trace"]) == pytest.approx(trace, rel=0.3)
    assert float(found["covariance_of_parts_trace"]) != pytest.approx(trace, rel=1e-3)
    assert float(found["covariance_of_parts_top"]) == pytest.approx(top, rel=0.5)


def test_a_batch_too_small_is_noted(probe: Probe) -> None:
    notes: list[str] = []
    assert probe(GradientCovariance(), net(), data(7), notes=notes) == {}
    assert any("at least 8 examples" in note for note in notes)


@pytest.mark.parametrize(("known", "runs"), [(1, True), (7, True), (8, False), (20, False)])
def test_it_does_not_probe_what_the_step_shows(probe: Probe, known: int, runs: bool) -> None:
    found = probe(GradientCovariance(), net(), data(), independent_gradients=known)
    assert bool(found) == runs


def test_buffers_and_masks_of_the_model_stay_as_they_are(probe: Probe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    found = probe(GradientCovariance(), model, data(33))
    assert all(torch.isfinite(item) for item in found.values())


@pytest.mark.parametrize("wrong", [3, 65, 25.0, True, "25", None])
def test_the_number_of_parts_is_checked(wrong: Any) -> None:
    with pytest.raises(gradwatch.errors.ConfigError, match="parts must be"):
        GradientCovariance(wrong)


@pytest.mark.parametrize("wrong", [1, -5, 4096.0, False, "all"])
def test_the_projection_is_checked(wrong: Any) -> None:
    with pytest.raises(gradwatch.errors.ConfigError, match="projection must be"):
        GradientCovariance(projection=wrong)


# --- Reading and deriving ----------------------------------------------------------------------


def view(count: int = 25, trace: float = 12.0, top: float = 3.0, **changes: Any) -> StepView:
    values = torch.tensor([trace, top, 0.36, 0.09])
    given = MicrobatchCovariance(values, count, 6.5, f"{count} micro-batches")
    settings: dict[str, Any] = {
        "step": 3,
        "model": ModelInfo(),
        "gradient_norms": NamedValues((), torch.zeros(0)),
        "microbatch_covariance": given,
    }
    return StepView(**settings | changes)


def derived(given: StepView, **changes: Any) -> dict[str, Measurement]:
    """All that comes of a step."""
    monitor = GradientCovariance()
    found = [
        item
        for reading in monitor.read(given)
        for item in reading.measurements(3, [float(tensor) for tensor in reading.tensors()])
    ]
    found += monitor.derive(StepInfo(step=3, **changes), found, ModelInfo())
    return {item.metric: item for item in found}


def test_values_have_units_errors_and_a_source() -> None:
    found = derived(view())
    trace, top, ratio = (found[metric] for metric in METRICS)
    assert (trace.value, trace.standard_error) == pytest.approx((12.0, 0.6))
    assert (top.value, top.standard_error) == pytest.approx((3.0, 0.3))
    assert {trace.unit, top.unit} == {"L²/P²"}
    assert {item.source for item in found.values()} == {"25 micro-batches"}
    assert ratio.unit == "1"
    assert ratio.value == pytest.approx(4.0)
    assert ratio.standard_error == pytest.approx(4.0 * math.hypot(0.05, 0.1))
    assert ratio.inputs == {"resolved": 1.0, "gradients": 25.0, "examples": 6.5}


def test_the_gradients_that_resolve_more_are_taken(probe: Probe) -> None:
    """A probe may have run because clipping hides the step's own gradient."""
    monitor = GradientCovariance()
    probed = probe(monitor, net(), data())
    for count, source in ((7, "25 parts of the batch"), (8, "8 micro-batches")):
        assert {item.source for item in monitor.read(view(count, probed=probed))} == {source}


@pytest.mark.parametrize(
    ("count", "ratio", "why"),
    [
        (25, 14.3, None),
        (25, 14.5, "25 gradients tell ratios up to 14.4"),
        (8, 4.1, None),
        (8, 4.3, "8 gradients tell ratios up to 4.2"),
        (7, 1.0, "at least 8 gradients"),
    ],
)
def test_a_ratio_that_is_not_resolved_says_so(count: int, ratio: float, why: str | None) -> None:
    found = derived(view(count, trace=ratio, top=1.0))["covariance_ratio"]
    assert found.inputs["resolved"] == float(why is None)
    assert ("not resolved" in found.source) == (why is not None)
    assert (why or "") in found.source


@pytest.mark.parametrize("top", [0.0, -1.0, math.nan, math.inf])
def test_without_a_direction_there_is_no_ratio(top: float) -> None:
    assert "covariance_ratio" not in derived(view(top=top))


def test_a_skipped_step_has_no_ratio() -> None:
    assert "covariance_ratio" not in derived(view(), skipped=True)


def test_ratios_that_nobody_asked_for_are_forgotten() -> None:
    monitor = GradientCovariance()
    for step in range(5):
        list(monitor.read(view(step=step)))
    list(monitor.derive(StepInfo(step=3), [], ModelInfo()))
    assert set(monitor._read) == {4}


def test_no_values_make_it_raise(survives: Check) -> None:
    def make() -> Monitor:
        monitor = GradientCovariance()
        list(monitor.read(view(step=0)))
        return monitor

    survives(make, METRICS)


def test_what_is_missing_is_noted() -> None:
    given = view(microbatch_covariance=None, microbatches_unavailable="the moon is full")
    assert list(GradientCovariance().read(given)) == []
    assert "the moon is full" in given.notes[0]
    assert "loss_fn" in given.notes[0]
    waiting = view(microbatch_covariance=None, loss_can_be_probed=True)
    assert list(GradientCovariance().read(waiting)) == []
    assert waiting.notes == []


# --- Through a watch ---------------------------------------------------------------------------


def train(
    sizes: Sequence[int],
    steps: int = 1,
    *,
    model: nn.Module | None = None,
    weigh: bool = False,
    scale: float = 1.0,
    every: Callable[[nn.Module], object] = lambda _: None,
    **options: Any,
) -> list[dict[str, Measurement]]:
    """Steps of no length over the first examples, in micro-batches of these sizes."""
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    told = gradwatch.MemorySink()
    settings: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}
    with gradwatch.watch(
        model, optimizer, monitors=[GradientCovariance()], sinks=[told], **settings | options
    ) as watch:
        for _ in range(steps):
            inputs, targets = (item[: sum(sizes)] for item in data())
            for part in torch.arange(sum(sizes)).split(list(sizes)):
                loss = loss_fn(model, (inputs[part], targets[part])) * len(part) / sum(sizes)
                if weigh:
                    watch.weigh_microbatch(len(part))
                scaler.scale(loss).backward()
                every(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return [{item.metric: item for item in report.measurements} for report in told.reports]


def assert_are(found: dict[str, Measurement], values: Sequence[float], rel: float = 1e-4) -> None:
    measured = [found[metric] for metric in METRICS[:2]]
    assert [item.value for item in measured] == pytest.approx(values[:2], rel=rel)
    assert [item.standard_error for item in measured] == pytest.approx(values[2:], rel=rel)


@pytest.mark.parametrize("sizes", [(8,) * 12, (4, 12) * 4, (24,) * 4], ids=str)
def test_accumulated_gradients_are_reused(sizes: tuple[int, ...]) -> None:
    for found in train(sizes, 3, weigh=len(set(sizes)) > 1):
        assert_are(found, expected(data(), len(sizes), sizes))
        ratio = found["covariance_ratio"]
        assert ratio.inputs["gradients"] == len(sizes)
        assert ratio.inputs["examples"] == pytest.approx(sum(sizes) / len(sizes))
        assert ratio.source.startswith(f"{len(sizes)} micro-batches")


def test_the_loss_scale_is_taken_out() -> None:
    assert_are(train((8,) * 12, scale=1024.0)[0], expected(data(), 12))


def test_the_trace_is_that_of_the_other_monitor() -> None:
    """`gradient_variance` is the same number, from norms instead of a Gram matrix."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitors = [gradwatch.monitors.GradientNoise(), GradientCovariance()]
    with gradwatch.watch(model, optimizer, monitors=monitors, on_error="raise") as watch:
        for inputs, targets in zip(*(item.split(8) for item in data()), strict=True):
            loss_fn(model, (inputs, targets)).backward()
        optimizer.step()
        summary = watch.summary()
    variance, trace = summary.value("gradient_variance"), summary.value("covariance_trace")
    assert trace == pytest.approx(variance, rel=1e-4)


def test_a_loop_that_probes_sees_the_same_as_one_that_accumulates() -> None:
    accumulated = train((4,) * 24)[0]
    probed = train((96,), 2, loss_fn=whole_loss, budget=None)[-1]
    assert probed["covariance_ratio"].source.startswith("25 parts of the batch")
    assert_are(probed, expected(data(), 25))
    assert probed["covariance_trace"].value == pytest.approx(
        accumulated["covariance_trace"].value, rel=0.1
    )


def whole_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model sees the inputs only: the targets of the fixed examples are found again."""
    every, targets = data()
    rows = (every[:, None] == inputs).all(2).float().argmax(0)
    return loss_fn(model, (inputs, targets[rows]))


def test_few_microbatches_give_way_to_the_probe() -> None:
    few = train((24,) * 4, loss_fn=whole_loss, budget=None)[0]
    assert few["covariance_ratio"].source.startswith("12 parts of the batch")
    many = train((8,) * 12, loss_fn=whole_loss, budget=None)[-1]
    assert many["covariance_ratio"].source == "12 micro-batches"


@pytest.mark.parametrize("sizes", [(96,), (32,) * 3], ids=["one", "three"])
def test_too_few_gradients_are_nothing(sizes: tuple[int, ...]) -> None:
    assert train(sizes, 2) == [{}, {}]


@pytest.mark.parametrize("sizes", [(96,), (32,) * 3, (8,) * 12], ids=["one", "three", "twelve"])
def test_gradients_are_projected_only_where_it_leads_to_something(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradwatch.numerics.projection import Projection

    calls: list[int] = []
    one = Projection.__call__

    def counted(projection: Projection, named: dict[str, Tensor]) -> Tensor:
        calls.append(0)
        return one(projection, named)

    monkeypatch.setattr(Projection, "__call__", counted)
    told = train(sizes, 3)
    per_step = len(calls) // len(sizes) // 4
    assert (len(told[-1]) > 0) == (len(sizes) >= 4)
    assert per_step == (3 if len(sizes) >= 4 else 1)


def test_a_watch_without_the_monitor_projects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwatch.numerics.projection import Projection

    def forbidden(*_: object) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(Projection, "__call__", forbidden)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    others = [gradwatch.monitors.GradientNoise(), gradwatch.monitors.MicrobatchGradientNorm()]
    with gradwatch.watch(model, optimizer, monitors=others, on_error="raise"):
        for inputs, targets in zip(*(item.split(8) for item in data()), strict=True):
            loss_fn(model, (inputs, targets)).backward()
        optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 8])
def test_training_is_bit_identical(
    accumulate: int,
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        watch = (
            gradwatch.watch(
                model,
                optimizer,
                monitors=[GradientCovariance()],
                every_n_steps=1,
                loss_fn=loss_fn,
                budget=None,
                on_error="raise",
            )
            if watched
            else None
        )
        for seed in range(6):
            inputs, targets = data(64, seed)
            for part in torch.arange(64).split(64 // accumulate):
                if watch is not None:
                    watch.observe(batch=(inputs[part], targets[part]))
                loss_fn(model, (inputs[part], targets[part])).backward()
            optimizer.step()
            optimizer.zero_grad()
        if watch is not None:
            assert watch.summary().value("covariance_trace") is not None
            watch.close()
        states.append(training_state(model, optimizer))
    assert_identical(*states)


# --- Several processes -------------------------------------------------------------------------


WRAPPERS: dict[str, Callable[[Any], Any]] = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


def on_this_rank(wrapper: str, accumulate: int, **options: Any) -> Any:
    """Each rank takes half of the examples, in `accumulate` micro-batches."""
    model, rank = WRAPPERS[wrapper](net()), torch.distributed.get_rank()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(
        model,
        optimizer,
        monitors=[GradientCovariance()],
        every_n_steps=1,
        log_every_n_steps=1,
        on_error="raise",
        **options,
    ) as watch:
        for _ in range(2):
            inputs, targets = (item[rank * 48 : rank * 48 + 48] for item in data())
            watch.observe(batch=(inputs, targets), batch_size=48)
            silent = getattr(model, "no_sync", nullcontext)
            *first, last = torch.arange(48).split(48 // accumulate)
            with silent():
                for part in first:
                    (loss_fn(model, (inputs[part], targets[part])) / accumulate).backward()
            (loss_fn(model, (inputs[last], targets[last])) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
        return watch.summary()


def one_accumulates_less() -> Any:
    return on_this_rank("DDP", 8 if torch.distributed.get_rank() else 2)


def two_ranks() -> dict[str, Any]:
    return {
        "DDP": on_this_rank("DDP", 8),
        "FSDP2": on_this_rank("FSDP2", 8),
        "probe": on_this_rank("DDP", 1, loss_fn=loss_fn, budget=None),
        "one": one_accumulates_less(),
    }


def test_of_two_processes(on_ranks: Callable[..., list[Any]]) -> None:
    ranks = on_ranks(two_ranks)
    inputs, targets = data()
    halves = [(inputs[:48], targets[:48]), (inputs[48:], targets[48:])]
    for mode, count in (("DDP", 8), ("FSDP2", 8), ("probe", 24)):
        each = [expected(half, count) for half in halves]
        for summary in (rank[mode] for rank in ranks):
            for place, metric in enumerate(METRICS[:2]):
                mean = (each[0][place] + each[1][place]) / 2
                assert summary.value(metric) == pytest.approx(mean, rel=1e-4)
            ratio = next(item for item in summary.measurements if item.metric == METRICS[2])
            assert ratio.inputs["gradients"] == count
            assert ("mean of 2 ranks" in ratio.source) == (mode != "probe")
    for rank in ranks:
        assert rank["one"].value("covariance_trace") is None
        assert "covariance_trace" in str(ranks[0]["one"].notes)

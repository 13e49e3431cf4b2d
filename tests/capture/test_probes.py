"""Probes: they touch nothing, fail alone, and it is said what they took."""

import gc
import io
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import SGD

import gradwatch
from gradwatch import ConsoleSink, JsonlSink, MemorySink, Monitor, Reading, Report
from gradwatch.capture.probe.view import ProbeView
from gradwatch.monitors import GradientNorm, NoiseCurvature

pytestmark = pytest.mark.usefixtures("one_thread")


# --- In a training -----------------------------------------------------------------------------


class Product(Monitor):
    """The product of the gradients of the two halves of the batch."""

    metrics = ("product",)
    probed = ("product",)

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        half = view.last.examples // 2
        first = view.gradient(view.last, rows=slice(half))
        second = view.gradient(view.last, rows=slice(half, 2 * half))
        return {
            "product": torch.stack([(first[name] * second[name]).sum() for name in first]).sum()
        }

    def read(self, view: gradwatch.StepView) -> Iterator[Reading]:
        if "product" in view.probed:
            yield Reading("product", view.probed["product"])


class Noisy(nn.Module):
    """Everything that a second evaluation could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.recurrent = nn.LSTM(4, 5, batch_first=True, dropout=0.2, num_layers=2)
        self.attention = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand())
        y = torch.relu(self.norm(self.convolution(x))) + 0.01 * noise
        y, _ = self.recurrent(y.transpose(1, 2))
        out: Tensor = self.head(self.attention(y).mean(1))
        return out


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def train(
    monitors: list[Monitor] | None,
    *,
    steps: int = 6,
    told: bool = True,
    make: Callable[[], nn.Module] = Noisy,
    **options: Any,
) -> tuple[nn.Module, SGD, list[float], gradwatch.Watch | None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = make()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    watch = None
    if monitors is not None:
        watch = gradwatch.watch(
            model,
            optimizer,
            monitors=monitors,
            **{"every_n_steps": 1, "log_every_n_steps": 1, "budget": None, **options},
        )
    losses = []
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randn(8, 3, 9, generator=data), torch.randint(2, (8,), generator=data)
        loss = loss_fn(model, batch)
        loss.backward()
        if watch is not None and told:
            watch.observe(batch=batch, gradients=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if watch is not None:
        watch.close()
    return model, optimizer, losses, watch


def test_a_probed_training_is_bit_identical(
    training_state: Callable[..., Any], assert_identical: Callable[[Any, Any], None]
) -> None:
    results = []
    arms: tuple[list[Monitor] | None, ...] = (None, [Product()])
    for monitors in arms:
        sink = MemorySink()
        options: dict[str, Any] = {"loss_fn": loss_fn, "sinks": [sink], "on_error": "raise"}
        model, optimizer, losses, _ = train(monitors, **(options if monitors else {}))
        results.append((training_state(model, optimizer), losses, model.calls))
        if monitors:
            found = [item for report in sink.reports for item in report.measurements]
            assert [item.metric for item in found] == ["product"] * 6
    assert_identical(results[0], results[1])


def test_the_probe_sees_the_parameters_before_the_step() -> None:
    """At the parameters after it, the batch is no fresh draw any more."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = SGD(model.parameters(), 0.5)
    sink = MemorySink()
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Product()],
        sinks=[sink],
        loss_fn=lambda model, x: model(x).square().mean(),
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        on_error="raise",
    )
    expected = []
    for _ in range(3):
        x = torch.randn(6, 3)
        gradients = [
            torch.autograd.grad(model(part).square().mean(), model.weight)[0]
            for part in (x[:3], x[3:])
        ]
        expected.append((gradients[0] * gradients[1]).sum().item())
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    found = [report.value("product") for report in sink.reports]
    assert found == pytest.approx(expected, rel=1e-5)


# --- Those that fail ---------------------------------------------------------------------------


class Failing(Product):
    """Fails in the middle of an evaluation, with a tensor in its hands."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.tries = 0
        self.held: list[weakref.ref[Tensor]] = []

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        self.tries += 1
        large = torch.ones(1000)
        loss = view.last.loss()  # changes buffers and draws random numbers
        self.held += [weakref.ref(large), weakref.ref(loss)]
        if self.tries == 1:
            raise type(self.error)(*self.error.args)  # a new one, which nobody else holds
        return {}


def test_a_failing_probe_is_switched_off_alone(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink()
    failing = Failing(OSError("no room left"))
    _, _, losses, watch = train([failing, GradientNorm()], loss_fn=loss_fn, sinks=[sink])
    assert watch is not None
    assert watch.failures == {"probe of monitor Failing": "OSError: no room left"}
    assert "please report this message" in caplog.text
    assert len(caplog.records) == failing.tries == 1
    assert len(losses) == len(sink.reports) == 6
    assert all(report.value("gradient_norm_used") is not None for report in sink.reports)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
NO_SECOND_DERIVATIVE = [
    RuntimeError(
        "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not "
        "implemented"
    ),
    NotImplementedError("the derivative for 'grad_output' is not implemented."),
    RuntimeError(
        "trying to differentiate twice a function that was marked with @once_differentiable"
    ),
    RuntimeError("torch.compile with aot_autograd does not currently support double backward"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_said_once_and_what_to_do(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(error)
    _, _, _, watch = train([failing, GradientNorm()], loss_fn=loss_fn)
    assert watch is not None
    what = watch.failures["probe of monitor Failing"]
    assert what.startswith("it ran out of memory (")
    assert "smaller probe_batch" in what
    assert "leave Failing out of monitors" in what
    assert "\n" not in what
    assert len(caplog.records) == failing.tries == 1
    assert "please report" not in caplog.text
    assert any(what in note for note in watch.summary().notes)


@pytest.mark.parametrize("error", NO_SECOND_DERIVATIVE, ids=repr)
def test_a_missing_second_derivative_is_said_once_and_what_to_do(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(error)
    _, _, _, watch = train([failing, GradientNorm()], loss_fn=loss_fn)
    assert watch is not None
    what = watch.failures["probe of monitor Failing"]
    assert what.startswith("Failing needs second derivatives")
    assert str(error) in what
    assert "everything else goes on" in what
    assert "attn_implementation='eager'" in what
    assert "Sharpness(finite_differences=True)" in what
    assert len(caplog.records) == failing.tries == 1


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], NO_SECOND_DERIVATIVE[0], OSError("x")])
def test_a_training_whose_probe_fails_is_bit_identical(
    error: Exception,
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    arms: list[list[Monitor] | None] = [None, [Failing(error)]]
    results = []
    for monitors in arms:
        model, optimizer, losses, watch = train(monitors, loss_fn=loss_fn)
        results.append((training_state(model, optimizer), losses, model.calls))
        assert watch is None or watch.failures
    assert_identical(results[0], results[1])


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], OSError("x")])
def test_a_failed_probe_keeps_no_memory(error: Exception) -> None:
    """A traceback holds every frame, and a frame what it computed; nobody collects garbage here."""
    failing = Failing(error)
    gc.collect()
    gc.disable()
    try:
        _, _, _, watch = train([failing], loss_fn=loss_fn)
        assert watch is not None
        assert watch.failures
        assert [held() for held in failing.held] == [None, None]
    finally:
        gc.enable()


class Once(torch.autograd.Function):
    """A square that only its author's backward can be taken of."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        out: Tensor = 2 * x * gradient
        return out


def ahead_of_time() -> Callable[[Tensor], Tensor]:
    """As `torch.compile` compiles it, where no stance can hold it off."""
    by_size: dict[int, Callable[[Tensor], Tensor]] = {}
    for size in (8, 4, 2):
        by_size[size] = aot_function(torch.square, fw_compiler=nop)
        by_size[size](torch.randn(size, 5, requires_grad=True))
    return lambda x: by_size[len(x)](x)


class Detached(torch.autograd.Function):
    """A square whose backward is a kernel of its own, of which torch knows no derivative."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        out: Tensor = 2 * x.detach() * gradient.detach()
        return out


class Squares(nn.Module):
    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(27, 5), nn.Linear(5, 2)
        self.square = square

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.square(self.first(x.flatten(1))))
        return out


@pytest.mark.parametrize(
    ("square", "message"),
    [
        (Once.apply, "once_differentiable"),
        (Detached.apply, "the backward of Detached has no derivative"),
        (ahead_of_time(), "double backward"),
    ],
)
def test_a_model_without_second_derivatives_is_trained_and_otherwise_measured(
    square: Any,
    message: str,
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    results, sink = [], MemorySink()
    arms: list[list[Monitor] | None] = [None, [NoiseCurvature(), Product()]]
    for monitors in arms:
        options: dict[str, Any] = {
            "make": lambda: Squares(square),
            "loss_fn": loss_fn,
            "sinks": [sink],
        }
        model, optimizer, losses, watch = train(monitors, **options)
        results.append((training_state(model, optimizer), losses))
    assert_identical(results[0], results[1])
    assert watch is not None
    assert list(watch.failures) == ["probe of monitor NoiseCurvature"]
    assert message in watch.failures["probe of monitor NoiseCurvature"]
    assert len([item for item in caplog.records if item.name == "gradwatch"]) == 1
    assert all(report.value("product") is not None for report in sink.reports)
    assert all(report.value("gradient_curvature") is None for report in sink.reports)


def test_the_user_who_asks_for_errors_gets_them() -> None:
    with pytest.raises(gradwatch.GradwatchError, match="it ran out of memory") as found:
        train([Failing(OUT_OF_MEMORY[0])], loss_fn=loss_fn, on_error="raise")
    assert isinstance(found.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "message", ["Expected more than 1 value per channel", "use_reentrant=True"]
)
def test_what_leads_to_nothing_three_times_is_not_tried_again(message: str) -> None:
    class InVain(Product):
        tries = 0

        def probe(self, view: ProbeView) -> dict[str, Tensor]:
            self.tries += 1
            raise ValueError(message)

    monitor = InVain()
    _, _, _, watch = train([monitor], loss_fn=loss_fn)
    assert watch is not None
    assert not watch.failures
    assert monitor.tries == 3
    assert any("it is not tried again" in note for note in watch.summary().notes)


@pytest.mark.parametrize(
    ("options", "told", "reason"),
    [
        ({}, True, "give the watch a loss_fn"),
        ({"loss_fn": loss_fn}, False, "watch.observe(batch=batch)"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, True, "must be a scalar"),
    ],
)
def test_a_loss_that_cannot_be_evaluated_is_a_note(
    options: dict[str, Any], told: bool, reason: str
) -> None:
    _, _, _, watch = train([Product()], told=told, **options)
    assert watch is not None
    assert not watch.failures
    (note,) = {note for note in watch.summary().notes if note.startswith("product")}
    assert reason in note


def test_a_number_that_was_not_announced_is_an_error_of_the_monitor() -> None:
    class Wrong(Product):
        def probe(self, view: ProbeView) -> dict[str, Tensor]:
            return {"other": torch.zeros(())}

    _, _, _, watch = train([Wrong()], loss_fn=loss_fn)
    assert watch is not None
    assert "other" in watch.failures["probe of monitor Wrong"]


def test_nothing_of_the_batch_is_kept_past_its_step() -> None:
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Product()],
        loss_fn=lambda model, x: model(x).square().mean(),
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
    )
    for _ in range(2):
        x = torch.randn(4, 3)
        model(x).square().mean().backward()
        optimizer.step()
        kept = weakref.ref(x)
        del x
        gc.collect()
        assert kept() is None
    watch.close()


# --- What they took, and when the next ones come ------------------------------------------------


class Slower(Product):
    metrics = ("slower",)
    probed = ("slower",)
    probe_cost = 30.0

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        return {"slower": super().probe(view)["product"]}


def test_the_report_says_what_was_spent_and_when_the_next_probes_come(tmp_path: Any) -> None:
    sink, stream = MemorySink(), io.StringIO()
    sinks = [sink, ConsoleSink(stream), JsonlSink(tmp_path)]
    monitors: list[Monitor] = [Slower(), Product()]
    _, _, _, watch = train(monitors, steps=40, loss_fn=loss_fn, budget=0.5, sinks=sinks)
    assert watch is not None
    uses = [report.probes for report in sink.reports]
    assert all(use is not None and use.budget == 0.5 for use in uses)
    assert uses[0] is not None
    assert uses[0].share == 0
    assert list(uses[0].next_steps) == ["Product", "Slower"]
    for report, use in zip(sink.reports, uses, strict=True):
        assert use is not None
        assert all(due > report.step for due in use.next_steps.values())
    assert uses[-1] is not None
    assert 0 < uses[-1].share < 1
    summary = watch.summary()
    assert summary.probes == uses[-1]
    assert str(summary.probes) in str(summary)
    assert f"  {uses[0]}\n" in stream.getvalue()
    assert [report.probes for report in gradwatch.read(tmp_path).reports] == uses


def test_without_a_budget_the_next_probe_comes_with_the_next_sampled_step() -> None:
    sink = MemorySink()
    options: dict[str, Any] = {"every_n_steps": 2, "log_every_n_steps": 2, "sinks": [sink]}
    train([Product()], steps=5, loss_fn=loss_fn, **options)
    for report in sink.reports:
        assert report.probes is not None
        assert report.probes.next_steps == {"Product": report.step + 2}
        assert "(no budget)" in str(report.probes)


@pytest.mark.parametrize(
    ("monitors", "options"),
    [
        ([GradientNorm()], {"loss_fn": loss_fn}),
        ([Product()], {}),
        ([Product()], {"budget": 1e-3}),
        ([Failing(OSError("x"))], {"loss_fn": loss_fn}),
    ],
)
def test_where_nothing_is_probed_nothing_is_said_of_it(
    monitors: list[Monitor], options: dict[str, Any]
) -> None:
    _, _, _, watch = train(monitors, **options)
    assert watch is not None
    assert watch.summary().probes is None
    assert "probes:" not in str(watch.summary())


def test_a_probe_that_is_off_is_not_foretold() -> None:
    class Unread(Slower):
        """Its probe works, but what it finds is of no use."""

        metrics = ("unread",)
        probed = ("unread",)

        def probe(self, view: ProbeView) -> dict[str, Tensor]:
            return {"unread": super().probe(view)["slower"]}

        def read(self, view: gradwatch.StepView) -> Iterator[Reading]:
            raise ValueError("x")

    _, _, _, watch = train([Failing(OSError("x")), Unread(), Slower()], loss_fn=loss_fn)
    assert watch is not None
    assert len(watch.failures) == 2
    use = watch.summary().probes
    assert use is not None
    assert list(use.next_steps) == ["Slower"]


def test_a_record_from_before_there_was_such_a_line_is_read() -> None:
    data = Report(step=3).to_dict()
    del data["probes"]
    assert Report.from_dict(data) == Report(step=3)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "all", True, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(gradwatch.ConfigError, match=r"budget must be None or a share"):
        gradwatch.watch(model, SGD(model.parameters(), 0.1), budget=budget)


def test_a_loss_function_that_takes_outputs_is_refused() -> None:
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(gradwatch.ConfigError, match="a CrossEntropyLoss, which takes outputs"):
        gradwatch.watch(model, optimizer, loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(gradwatch.ConfigError, match="probe_batch needs a loss_fn"):
        gradwatch.watch(model, optimizer, probe_batch=torch.zeros(2, 3))

"""Whatever the training loop looks like, the reported numbers are those of the optimizer step.

Each loop keeps its own books in float64: the gradients that the optimizer is about to consume,
unscaled, and the parameters before and after. The reports must agree with them to 1e-5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import gradwatch

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-5
BATCH = 5
Tensors = dict[str, Tensor]


# --- Books -------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What one optimizer step should be reported as."""

    used: Tensors
    moved: Tensors
    lrs: tuple[float, ...]
    loss: float | None = None
    batch_size: int | None = BATCH
    raw: Tensors | None = None
    skipped: bool = False
    epoch: float | None = None


@dataclass
class Books:
    """A watched model and the float64 records of its steps."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.told = gradwatch.MemorySink()
        settings: dict[str, Any] = {"track_loss": True, "on_error": "raise"} | self.options
        optimizers = self.optimizers if len(self.optimizers) > 1 else self.optimizers[0]
        self.watch = gradwatch.watch(
            self.model,
            optimizers,
            every_n_steps=1,
            log_every_n_steps=1,
            sinks=[self.told],
            **settings,
        )
        self.entries: list[Entry] = []
        self.used: Tensors = {}
        self.before: Tensors = {}
        self.seen: float | None = None

    @property
    def optimizer(self) -> Optimizer:
        return self.optimizers[0]

    def named(self, optimizer: Optimizer | None = None) -> Tensors:
        """The parameters of one optimizer, or of all."""
        names = {id(item): name for name, item in self.model.named_parameters()}
        found: Tensors = {}
        for item in [optimizer] if optimizer is not None else self.optimizers:
            for number, group in enumerate(item.param_groups):
                for place, parameter in enumerate(group["params"]):
                    name = names.get(id(parameter), f"group{number}.{place}")
                    found[name] = parameter
        return found

    def gradients(self, scale: float = 1.0, optimizer: Optimizer | None = None) -> Tensors:
        """Copies of the gradients in double precision, divided by the loss scale."""
        return {
            name: item.grad.to_dense().detach().to(wide(item), copy=True) / scale
            for name, item in self.named(optimizer).items()
            if item.grad is not None
        }

    def about_to_step(self, scale: float = 1.0, optimizer: Optimizer | None = None) -> None:
        """To be called right before the step, and from the first evaluation of a closure."""
        self.used.update(self.gradients(scale, optimizer))
        parameters = self.named(optimizer)
        self.before.update(
            {name: item.detach().to(wide(item), copy=True) for name, item in parameters.items()}
        )

    def stepped(self, **expected: Any) -> None:
        """To be called right after the step: writes it into the books."""
        now = self.named()
        moved = {
            name: now[name].detach().to(wide(now[name])) - self.before[name] for name in self.used
        }
        lrs = tuple(float(group["lr"]) for item in self.optimizers for group in item.param_groups)
        self.entries.append(Entry(self.used, moved, lrs, **expected))
        self.used, self.before = {}, {}

    def loss(self, batch: int = BATCH) -> Tensor:
        """The loss of a new batch."""
        output: Tensor = self.model(torch.randn(batch, 6))
        return output.square().mean()

    def backward(self, batch: int = BATCH) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        return loss.item()


def wide(item: Tensor) -> torch.dtype:
    return torch.complex128 if item.is_complex() else torch.float64


def size(values: Tensors) -> float:
    """The norm of all of them together."""
    return math.sqrt(sum(float(item.abs().square().sum()) for item in values.values()))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def books(optimizer: Callable[..., Optimizer] = SGD, **options: Any) -> Books:
    model = mlp()
    return Books(model, [optimizer(model.parameters(), lr=0.1)], options)


STYLES: dict[str, Callable[[], Books]] = {}


def style(function: Callable[[], Books]) -> Callable[[], Books]:
    STYLES[function.__name__] = function
    return function


# --- Loops -------------------------------------------------------------------------------------


@style
def plain() -> Books:
    run = books(AdamW)
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    return run


@style
def momentum_and_weight_decay() -> Books:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]  # type: ignore[index]
    run = Books(model, [SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    return run


@style
def scheduler() -> Books:
    """The learning rate of a step is the one that it was taken with."""
    run = books()
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, gamma=0.5)
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
        schedule.step()
    return run


@style
def tensor_learning_rate() -> Books:
    """A scheduler changes such a learning rate in place."""
    model = mlp()
    lr = torch.tensor(0.1)
    run = Books(model, [SGD(model.parameters(), lr=lr, foreach=False)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
        lr.mul_(0.5)
    return run


@style
def accumulate_4() -> Books:
    run = books(Adam)
    for _ in range(3):
        losses = []
        for _ in range(4):
            loss = run.loss() / 4
            loss.backward()
            losses.append(loss.item())
        run.about_to_step()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.stepped(loss=sum(losses), batch_size=4 * BATCH)
    return run


@style
def accumulate_unequal_parts_told() -> Books:
    run = books(track_loss=False)
    for epoch in range(3):
        for part in (5, 2):
            loss = run.loss(part)
            loss.backward()
        run.watch.observe(loss=loss, batch_size=100, epoch=epoch / 2)
        run.about_to_step()
        raw = run.gradients()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.stepped(loss=loss.item(), batch_size=100, epoch=epoch / 2, raw=raw)
    return run


@style
def clip() -> Books:
    run = books(track_clipping=True)
    for number in range(4):
        loss = run.backward()
        raw = run.gradients()
        clip_grad_norm_(run.model.parameters(), 0.05 if number % 2 else 1e6)
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, raw=raw)
    return run


@style
def clip_with_the_watch() -> Books:
    run = books()
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        total = run.watch.clip_grad_norm_(0.05)
        assert float(total) == pytest.approx(size(raw), rel=EXACT)
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, raw=raw)
    return run


@style
def clip_in_parts() -> Books:
    """Two modules are clipped by themselves, one of them only."""
    run = books(track_clipping=True)
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        clip_grad_norm_(run.model[2].parameters(), 0.01)  # type: ignore[index]
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, raw=raw)
    return run


@style
def clip_by_largest_entry() -> Books:
    """The maximum norm has another norm, the factor is what counts."""
    run = books(track_clipping=True)
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        clip_grad_norm_(run.model.parameters(), 0.01, norm_type=torch.inf)
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, raw=raw)
    return run


@style
def observe_before_clipping_by_value() -> Books:
    """Clipping by value cannot be undone, so it must be observed."""
    run = books()
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        run.watch.observe()
        nn.utils.clip_grad_value_(run.model.parameters(), 0.01)
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, raw=raw)
    return run


@style
def observe_too_early() -> Books:
    """Before backward there is no gradient, so nothing is known of clipping."""
    run = books(track_loss=False)
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.loss()
        run.watch.observe(loss=loss)
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item())
    return run


def scaling(
    run: Books, *, unscale: bool = False, fused: bool = False, overflow: bool = False
) -> Books:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        run.optimizer.zero_grad()
        loss = run.loss()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        infinite = overflow and number == 1
        if infinite:
            next(run.model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        raw = None
        if unscale:
            scaler.unscale_(run.optimizer)
            raw = run.gradients()
            clip_grad_norm_(run.model.parameters(), 0.05)
        run.about_to_step(1.0 if unscale else scale)
        scaler.step(run.optimizer)
        scaler.update()
        if fused or not infinite:
            run.stepped(loss=loss.item() * scale, raw=raw, skipped=infinite)
        else:
            run.used, run.before = {}, {}
    return run


@style
def scaler_unscale_and_clip() -> Books:
    return scaling(books(track_clipping=True), unscale=True)


@style
def scaler_implicit() -> Books:
    return scaling(books())


@style
def scaler_implicit_fused_sgd() -> Books:
    model = mlp()
    return scaling(Books(model, [SGD(model.parameters(), lr=0.1, fused=True)]), fused=True)


@style
def scaler_implicit_fused_adam() -> Books:
    model = mlp()
    return scaling(Books(model, [Adam(model.parameters(), lr=0.1, fused=True)]), fused=True)


@style
def scaler_unscale_fused() -> Books:
    model = mlp()
    run = Books(model, [Adam(model.parameters(), lr=0.1, fused=True)], {"track_clipping": True})
    return scaling(run, unscale=True, fused=True)


@style
def scaler_overflow_fused() -> Books:
    model = mlp()
    run = Books(model, [AdamW(model.parameters(), lr=0.1, fused=True)])
    return scaling(run, fused=True, overflow=True)


def with_closure(run: Books, steps: int, **how: Any) -> Books:
    for _ in range(steps):
        values = torch.randn(BATCH, 6)
        losses: list[float] = []

        def closure(values: Tensor = values, losses: list[float] = losses) -> Tensor:
            run.optimizer.zero_grad()
            loss: Tensor = run.model(values).square().mean()
            loss.backward()
            if not losses:
                run.about_to_step()
            losses.append(loss.item())
            return loss

        if how.get("keyword"):
            run.optimizer.step(closure=closure)  # type: ignore[arg-type]
        else:
            run.optimizer.step(closure)  # type: ignore[arg-type]
        run.stepped(loss=losses[0], batch_size=BATCH * len(losses))
    return run


@style
def closure() -> Books:
    return with_closure(books(Adam), 3)


@style
def closure_by_keyword() -> Books:
    return with_closure(books(track_loss=False), 3, keyword=True)


@style
def lbfgs() -> Books:
    """The line search evaluates the closure many times; the first one is where it began."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    return with_closure(Books(model, [optimizer]), 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(values)))
        return output


@style
def tied_weight() -> Books:
    torch.manual_seed(0)
    model = Tied()
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    assert [len(entry.used) for entry in run.entries] == [3, 3, 3]
    return run


@style
def frozen_and_unused() -> Books:
    model = mlp()
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    model.register_parameter("unused", nn.Parameter(torch.ones(4)))
    run = Books(model, [Adam(model.parameters(), lr=0.1)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    assert run.watch.model_info.frozen == ("0.bias",)
    assert any("no gradient reached unused" in note for note in run.told.reports[0].notes)
    return run


@style
def unfrozen_on_the_way() -> Books:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    run = Books(model, [Adam(model.parameters(), lr=0.1)])
    for number in range(4):
        model[0].requires_grad_(number >= 2)  # type: ignore[index]
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    assert [len(entry.used) for entry in run.entries] == [2, 2, 4, 4]
    return run


@style
def parameters_added_later() -> Books:
    model = mlp()
    run = Books(model, [SGD(model[2].parameters(), lr=0.1)])  # type: ignore[index]
    for number in range(4):
        if number == 2:
            run.optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})  # type: ignore[index]
        model.zero_grad()
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    assert [len(entry.used) for entry in run.entries] == [2, 2, 4, 4]
    return run


@style
def parameter_of_nobody() -> Books:
    """The optimizer also holds a parameter that is not the model's, such as a temperature."""
    model = mlp()
    temperature = nn.Parameter(torch.ones(1))
    run = Books(model, [SGD([*model.parameters(), temperature], lr=0.1)])
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.loss() * temperature.exp().sum()
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item())
    assert "group0.4" in run.entries[0].used
    return run


@style
def optimizer_in_backward() -> Books:
    """Each parameter is stepped by its own optimizer as soon as its gradient is there."""
    model = mlp()
    tiny = {item: SGD([item], lr=0.1, momentum=0.9) for item in model.parameters()}
    run = Books(model, list(tiny.values()))

    def step(parameter: Tensor) -> None:
        optimizer = tiny[parameter]  # type: ignore[index]
        run.about_to_step(optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss = run.loss()
        loss.backward()
        run.stepped(loss=loss.item())
    return run


class Base(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Nested(Base):
    """Does something before and after the step of its parent, whose hooks fire as well."""

    def step(self, closure: Any = None) -> Any:
        self.decay(0.9)
        result = super().step(closure)
        self.decay(0.99)
        return result

    def decay(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(factor)


@style
def nested_step() -> Books:
    model = mlp()
    SGD(mlp().parameters(), lr=0.1)  # now the parent's step fires hooks as well
    Base(mlp().parameters(), lr=0.1)
    run = Books(model, [Nested(model.parameters(), lr=0.1)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    return run


@style
def nested_step_with_closure() -> Books:
    model = mlp()
    SGD(mlp().parameters(), lr=0.1)
    return with_closure(Books(model, [Base(model.parameters(), lr=0.1)]), 3)


def checkpointed(reentrant: bool, batch_size: int | None) -> Books:
    """The whole model is run again in the backward pass."""
    run = books()
    for _ in range(3):
        run.optimizer.zero_grad()
        values = torch.randn(BATCH, 6, requires_grad=reentrant)
        loss = checkpoint(run.model, values, use_reentrant=reentrant).square().mean()
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item(), batch_size=batch_size)
    return run


@style
def checkpointed_model() -> Books:
    return checkpointed(False, BATCH)


@style
def checkpointed_model_reentrant() -> Books:
    """Its only forward with gradients is inside the backward pass, where nothing is counted."""
    return checkpointed(True, None)


@style
def two_optimizers() -> Books:
    """Both step after one backward."""
    model = mlp()
    first = SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    second = Adam(model[2].parameters(), lr=0.01)  # type: ignore[index]
    run = Books(model, [first, second])
    for number in range(4):
        model.zero_grad()
        loss = run.backward()
        run.about_to_step()
        for optimizer in (first, second) if number % 2 else (second, first):
            optimizer.step()
        run.stepped(loss=loss)
    return run


@style
def two_optimizers_alternating() -> Books:
    """Each has its own forward and backward; a step is a round of both."""
    model = mlp()
    first = SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    second = Adam(model[2].parameters(), lr=0.01)  # type: ignore[index]
    run = Books(model, [first, second])
    for _ in range(3):
        losses = []
        for optimizer in (first, second):
            model.zero_grad()
            losses.append(run.backward())
            run.about_to_step(optimizer=optimizer)
            optimizer.step()
        run.stepped(loss=sum(losses), batch_size=2 * BATCH)
    return run


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.table((values[:, 0].abs() * 3).long().clamp(max=9))
        return output


@style
def sparse_gradients() -> Books:
    """The rows of a sparse gradient may be listed twice; only their sum counts."""
    torch.manual_seed(0)
    model = Embedding()
    run = Books(model, [torch.optim.SparseAdam(model.parameters(), lr=0.1)])
    for _ in range(3):
        loss = run.backward(batch=40)
        gradient = next(model.parameters()).grad
        assert gradient is not None
        assert not gradient.is_coalesced()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss, batch_size=40)
    return run


@style
def double_precision() -> Books:
    model = mlp(torch.float64)
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = model(torch.randn(BATCH, 6).double()).square().mean()
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item())
    return run


@style
def brain_floats() -> Books:
    model = mlp(torch.bfloat16)
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = model(torch.randn(BATCH, 6).bfloat16()).float().square().mean()
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item())
    return run


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, values: Tensor) -> Tensor:
        return torch.view_as_real(values.to(torch.complex64) @ self.weight)


@style
def complex_parameters() -> Books:
    torch.manual_seed(0)
    model = Complex()
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    return run


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(6, 3)

    def forward(self, values: nn.utils.rnn.PackedSequence) -> Tensor:
        output: Tensor = self.rnn(values)[1]
        return output


@style
def packed_sequences() -> Books:
    """The batch is the number of sequences, not of time steps."""
    torch.manual_seed(0)
    model = Packed()
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        run.optimizer.zero_grad()
        sequences = [torch.randn(length, 6) for length in (7, 4, 2)]
        loss = model(nn.utils.rnn.pack_sequence(sequences)).square().mean()
        loss.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss.item(), batch_size=3)
    return run


class OutOfMemoryError(RuntimeError):
    pass


class Fragile(SGD):
    """A step that fails when it is told to, after the watch has seen the gradients."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise OutOfMemoryError
        return super().step(closure)


@style
def step_that_raises() -> Books:
    """The loop goes on with the next batch."""
    model = mlp()
    optimizer = Fragile(model.parameters(), lr=0.1)
    run = Books(model, [optimizer])
    for number in range(6):
        loss = run.backward(batch=number + 1)
        optimizer.fails = number in {0, 2, 3}
        run.about_to_step()
        try:
            run.optimizer.step()
        except OutOfMemoryError:
            continue
        run.stepped(loss=loss, batch_size=number + 1)
    assert len(run.entries) == 3
    return run


@style
def closure_that_raises() -> Books:
    """It raises before the forward, after it, and after the backward."""
    run = books()
    for number in range(7):
        losses: list[float] = []

        def closure(number: int = number, losses: list[float] = losses) -> Tensor:
            run.optimizer.zero_grad()
            if number == 1:
                raise OutOfMemoryError
            loss = run.loss(number + 1)
            if number == 3:
                raise OutOfMemoryError
            loss.backward()
            if number == 5:
                raise OutOfMemoryError
            run.about_to_step()
            losses.append(loss.item())
            return loss

        try:
            run.optimizer.step(closure)  # type: ignore[arg-type]
        except OutOfMemoryError:
            continue
        run.stepped(loss=losses[0], batch_size=number + 1)
    assert len(run.entries) == 4
    return run


class Moody(nn.Module):
    """A forward that fails half way when it is told to."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.relu(self.first(values))
        if self.fails:
            raise OutOfMemoryError
        output: Tensor = self.second(hidden)
        return output


@style
def forward_that_raises() -> Books:
    """Too large a batch is tried again with a smaller one."""
    torch.manual_seed(0)
    model = Moody()
    run = Books(model, [SGD(model.parameters(), lr=0.1)])
    for _ in range(3):
        model.fails = True
        with pytest.raises(OutOfMemoryError):
            run.backward(batch=64)
        model.fails = False
        loss = run.backward()
        run.about_to_step()
        run.optimizer.step()
        run.stepped(loss=loss)
    assert [layer.activation for layer in run.watch.model_info.layers] == ["relu", None]
    return run


# --- Reports against books ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> Callable[[str], Books]:
    finished: dict[str, Books] = {}

    def get(name: str) -> Books:
        if name not in finished:
            run = STYLES[name]()
            run.watch.close()
            assert not run.watch.failures
            finished[name] = run
        return finished[name]

    return get


Runs = Callable[[str], Books]


def pairs(run: Books) -> list[tuple[gradwatch.Report, Entry]]:
    assert run.watch.step == len(run.entries)
    assert [report.step for report in run.told.reports] == list(range(len(run.entries)))
    assert all(len(report.steps) == 1 for report in run.told.reports)
    return list(zip(run.told.reports, run.entries, strict=True))


def by_parameter(report: gradwatch.Report, metric: str) -> dict[str, float]:
    found = [item for item in report.measurements if item.metric == metric]
    values = {item.scope: item.value for item in found if item.scope != "model"}
    assert len(values) == len([item for item in found if item.scope != "model"])
    return values


@pytest.mark.parametrize("name", STYLES)
def test_the_used_gradient_is_what_the_optimizer_consumed(name: str, runs: Runs) -> None:
    for report, entry in pairs(runs(name)):
        if entry.skipped:
            assert report.value("gradient_norm_used") is None
            continue
        assert report.value("gradient_norm_used") == pytest.approx(size(entry.used), rel=EXACT)
        expected = {key: size({key: item}) for key, item in entry.used.items()}
        assert by_parameter(report, "gradient_norm_used") == pytest.approx(
            expected, rel=EXACT, abs=1e-12
        )


@pytest.mark.parametrize("name", STYLES)
def test_the_raw_gradient_is_the_one_before_clipping_or_not_told(name: str, runs: Runs) -> None:
    for report, entry in pairs(runs(name)):
        if entry.raw is None:
            assert report.value("gradient_norm") is None
            assert report.value("clip_coefficient") is None
            assert report.info.grads_clipped is None
            continue
        raw = size(entry.raw)
        assert report.value("gradient_norm") == pytest.approx(raw, rel=EXACT)
        expected = {key: size({key: item}) for key, item in entry.raw.items()}
        assert by_parameter(report, "gradient_norm") == pytest.approx(
            expected, rel=EXACT, abs=1e-12
        )
        coefficient = size(entry.used) / raw
        assert report.value("clip_coefficient") == pytest.approx(coefficient, rel=EXACT)
        assert report.info.grads_clipped == (coefficient < 0.999)


@pytest.mark.parametrize("name", STYLES)
def test_the_update_is_the_difference_of_the_parameters(name: str, runs: Runs) -> None:
    run = runs(name)
    for report, entry in pairs(run):
        if entry.skipped:
            assert report.value("update_norm") is None
            assert size(entry.moved) == 0
            continue
        assert size(entry.moved) > 0
        assert report.value("update_norm") == pytest.approx(size(entry.moved), rel=EXACT)
        assert by_parameter(report, "update_ratio").keys() == entry.moved.keys()


@pytest.mark.parametrize("name", STYLES)
def test_the_settings_of_the_step_are_right(name: str, runs: Runs) -> None:
    run = runs(name)
    for report, entry in pairs(run):
        info = report.info
        assert info.step == report.step
        assert info.lrs == pytest.approx(entry.lrs, rel=1e-6)
        assert info.lr == max(info.lrs)
        assert info.batch_size == entry.batch_size
        assert info.loss == pytest.approx(entry.loss, rel=EXACT)
        assert info.epoch == entry.epoch
        assert info.skipped == entry.skipped
        kinds = dict.fromkeys(type(item).__name__ for item in run.optimizers)
        assert info.optimizer == "+".join(kinds)
        ratio = report.value("lr_batch_ratio")
        if entry.batch_size is None:
            assert ratio is None
        else:
            assert ratio == pytest.approx(entry.lrs[0] / entry.batch_size, rel=EXACT)


# --- What has no place in the books ------------------------------------------------------------


def test_a_step_that_the_scaler_leaves_out_is_no_step() -> None:
    """An optimizer that is not fused is not called at all."""
    run = scaling(books(), overflow=True)
    run.watch.close()
    assert run.watch.step == len(run.entries) == 3
    for report, entry in pairs(run):
        assert report.value("gradient_norm_used") == pytest.approx(size(entry.used), rel=EXACT)
        assert report.value("update_norm") == pytest.approx(size(entry.moved), rel=EXACT)


def test_the_scale_is_told_where_the_optimizer_takes_it_out() -> None:
    run = scaler_overflow_fused()
    run.watch.close()
    assert [report.info.loss_scale for report in run.told.reports] == [1024, 1024, 512, 512]
    assert all(report.recommendations == () for report in run.told.reports)


def test_a_learning_rate_that_is_a_tensor_is_that_of_its_step() -> None:
    """Also where the report comes after the scheduler has changed it in place."""
    model = mlp()
    lr = torch.tensor(0.8)
    optimizer = SGD(model.parameters(), lr=lr, foreach=False)
    told = gradwatch.MemorySink()
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=3, on_error="raise"
    ):
        for _ in range(4):
            model(torch.randn(BATCH, 6)).sum().backward()
            optimizer.step()
            lr.mul_(0.5)
    steps = [info for report in told.reports for info in report.steps]
    assert [info.lr for info in steps] == pytest.approx([0.8, 0.4, 0.2, 0.1])
    ratios = [item for report in told.reports for item in report.measurements]
    found = [item.value * BATCH for item in ratios if item.metric == "lr_batch_ratio"]
    assert found == pytest.approx([0.8, 0.4, 0.2, 0.1])


def test_gradients_that_are_not_finite_are_measured() -> None:
    run = books(track_clipping=True)
    run.backward()
    next(run.model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    run.optimizer.step()
    run.watch.close()
    report = run.told.reports[0]
    assert math.isnan(report.value("gradient_norm_used") or 0)
    assert report.value("nonfinite_gradient") == 1
    assert report.value("nonfinite_gradient", "0.weight") == 1
    assert [item.knob for item in report.recommendations] == ["numerics"]


def test_gradients_that_are_all_zero_are_not_clipped() -> None:
    run = books(track_clipping=True)
    run.optimizer.zero_grad()
    (run.loss() * 0).backward()
    clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.watch.close()
    report = run.told.reports[0]
    assert report.value("gradient_norm_used") == report.value("gradient_norm") == 0
    assert report.value("clip_coefficient") == 1
    assert report.value("update_ratio") == 0


def test_one_optimizer_that_steps_twice_ends_the_round() -> None:
    """As with two critic steps for each of the generator: a round has each at most once."""
    model = mlp()
    first = SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    second = SGD(model[2].parameters(), lr=0.1)  # type: ignore[index]
    run = Books(model, [first, second])
    for _ in range(2):
        run.backward()
        run.about_to_step(optimizer=first)
        first.step()
        run.stepped()
        run.backward()
        run.about_to_step()
        first.step()
        second.step()
        run.stepped()
    run.watch.close()
    for report, entry in pairs(run):
        assert report.value("gradient_norm_used") == pytest.approx(size(entry.used), rel=EXACT)
        assert by_parameter(report, "gradient_norm_used").keys() == entry.used.keys()

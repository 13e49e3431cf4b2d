"""In Lightning the reported numbers are those of the training, in whatever mode it runs.

The reference of a mode is the same training in double precision, in a loop of plain PyTorch that
knows nothing of Lightning. Under mixed precision no other loop gives the same numbers: there the
optimizer itself writes down, in double precision, what it is given and what it does.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradwatch
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

FAMILY = "Lightning"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

BATCHES = 6
SIZE = 5
LR = 0.1
EXACT = 1e-5
Norms = dict[str, float]
Entry = dict[str, Any]  # quantity -> what should be reported of one optimizer step
Step = Callable[[Any, Any, int], Any]


# --- The same network, in Lightning and without ------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(count, SIZE, 6, generator=generator)
    return [(item, item[:, :3] ** 2) for item in values]


def loader(count: int = BATCHES) -> DataLoader[Any]:
    values, wanted = (torch.cat(parts) for parts in zip(*batches(count), strict=True))
    return DataLoader(TensorDataset(values, wanted), batch_size=SIZE)


def mse(net: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (net(batch[0]) - batch[1]).square().mean()
    return loss


def automatic(self: Any, batch: Any, index: int) -> Tensor:
    return mse(self.net, batch)


def module(optimizers: Callable[[Any], Any], training_step: Step, *, manual: bool = False) -> Any:
    pl: Any = importlib.import_module("lightning.pytorch")

    class Small(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.automatic_optimization = not manual

        def forward(self, values: Tensor) -> Any:
            return self.net(values)

    Small.training_step = training_step
    Small.configure_optimizers = optimizers
    return Small()


def reports_of(model: Any, data: Any = None, **options: Any) -> list[gradwatch.Report]:
    """Trains and gives the report of each optimizer step, on this rank."""
    pl: Any = importlib.import_module("lightning.pytorch")
    told = gradwatch.MemorySink()
    callback = GradwatchCallback(
        sinks=[told], every_n_steps=1, log_every_n_steps=1, on_error="raise"
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(callbacks=[callback], **settings | options).fit(model, data or loader())
    return told.reports


# --- Plain loops in double precision -----------------------------------------------------------


class Plain:
    """The network in double precision, with the books of its training."""

    def __init__(self) -> None:
        self.net = network().double()
        self.entries: list[Entry] = []
        self.outputs: Norms = {}
        self.losses: list[float] = []
        self.samples = 0
        for name, layer in self.net.named_children():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(self._note(name))

    def _note(self, name: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: Any, output: Tensor) -> None:
            mean = output.detach().square().sum(1).mean()
            self.outputs[f"net.{name}"] = float(mean.sqrt())

        return note

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"net.{name}": item for name, item in self.net.named_parameters()}

    def loss(self, batch: Any) -> Tensor:
        loss = mse(self.net, [part.double() for part in batch])
        self.losses.append(loss.item())
        self.samples += len(batch[0])
        return loss

    def gradients(self) -> Norms:
        return with_total(
            {name: item.grad for name, item in self.parameters.items() if item.grad is not None}
        )

    def step(self, *optimizers: Any, raw: Norms | None, lr: float = LR, **more: Any) -> None:
        """Takes the step and writes the entry."""
        before = {name: item.detach().clone() for name, item in self.parameters.items()}
        used = self.gradients()
        for optimizer in optimizers:
            optimizer.step()
        moved = {name: item.detach() - before[name] for name, item in self.parameters.items()}
        entry = {
            "gradient_norm_used": used,
            "gradient_norm": raw,
            "update_norm": with_total(moved)["model"],
            "activation_norm": dict(self.outputs),
            "loss": sum(self.losses) / len(self.losses),
            "batch_size": self.samples,
            "lr": lr,
        }
        self.entries.append(entry | more)
        self.losses, self.samples = [], 0


def with_total(values: dict[str, Tensor]) -> Norms:
    norms = {name: float(item.double().norm()) for name, item in values.items()}
    return norms | {"model": sum(norm**2 for norm in norms.values()) ** 0.5}


def plain_loop(
    *,
    accumulate: int = 1,
    clip: Callable[[Any], Any] | None = None,
    gamma: float = 1.0,
    make: Callable[..., Any] = torch.optim.SGD,
) -> list[Entry]:
    plain = Plain()
    optimizer = make(plain.net.parameters(), lr=LR)
    data = batches()
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for batch in data[start : start + accumulate]:
            (plain.loss(batch) / accumulate).backward()
        raw = plain.gradients()
        if clip is not None:
            clip(plain.net.parameters())
        plain.step(optimizer, raw=raw, lr=optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] *= gamma
    return plain.entries


# --- Comparison --------------------------------------------------------------------------------


def scoped(report: gradwatch.Report, metric: str) -> Norms:
    return {item.scope: item.value for item in report.measurements if item.metric == metric}


def compare(
    cell: Any,
    mode: str,
    reports: Sequence[gradwatch.Report],
    entries: Sequence[Entry],
    rel: float = EXACT,
) -> None:
    assert len(reports) == len(entries) > 0
    for report, entry in zip(reports, entries, strict=True):
        found: Entry = {
            "gradient_norm_used": scoped(report, "gradient_norm_used"),
            "gradient_norm": scoped(report, "gradient_norm"),
            "update_norm": report.value("update_norm"),
            "activation_norm": scoped(report, "activation_norm"),
            "loss": report.value("loss"),
            "batch_size": report.info.batch_size,
            "lr": report.info.lr,
        }
        assert report.info.loss == found["loss"]
        for quantity, expected in entry.items():
            cell.equal(mode, quantity, found[quantity], expected, rel)
        off = [note for note in report.notes if " is off" in note]
        assert not off


# --- Automatic optimization --------------------------------------------------------------------


def sgd(self: Any) -> Any:
    return torch.optim.SGD(self.parameters(), lr=LR)


def adam(self: Any) -> Any:
    return torch.optim.Adam(self.parameters(), lr=LR)


def decaying(self: Any) -> Any:
    optimizer = sgd(self)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def through_the_module(self: Any, batch: Any, index: int) -> Tensor:
    return mse(self, batch)


def by_norm(parameters: Any) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.1)


def by_value(parameters: Any) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
AUTOMATIC: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "plain": (adam, {}, {"make": torch.optim.Adam}),
    "scheduler": (decaying, {}, {"gamma": 0.5}),
    "accumulate 4 of 6": (sgd, {"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "clip by norm": (sgd, {"gradient_clip_val": 0.1}, {"clip": by_norm}),
    "clip by value": (sgd, VALUE, {"clip": by_value}),
    "accumulate and clip": (
        sgd,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"accumulate": 2, "clip": by_norm},
    ),
}


@pytest.mark.parametrize("training_step", [automatic, through_the_module])
@pytest.mark.parametrize("mode", AUTOMATIC)
def test_automatic_optimization(cell: Any, mode: str, training_step: Step) -> None:
    optimizers, options, loop = AUTOMATIC[mode]
    reports = reports_of(module(optimizers, training_step), **options)
    compare(cell, mode, reports, plain_loop(**loop))


def test_lbfgs(cell: Any) -> None:
    """What is evaluated once more counts once; the first evaluation is where the step began."""
    options: dict[str, Any] = {"lr": LR, "max_iter": 3, "line_search_fn": "strong_wolfe"}
    model = module(lambda self: torch.optim.LBFGS(self.parameters(), **options), automatic)
    reports = reports_of(model)
    plain = Plain()
    optimizer = torch.optim.LBFGS(plain.net.parameters(), **options)
    for batch in batches():
        first: list[Any] = []

        def closure(batch: Any = batch, first: list[Any] = first) -> Tensor:
            optimizer.zero_grad()
            loss = plain.loss(batch)
            loss.backward()
            if not first:
                first.append((plain.gradients(), dict(plain.outputs), loss.item()))
            return loss

        before = {name: item.detach().clone() for name, item in plain.parameters.items()}
        optimizer.step(closure)
        gradient, outputs, loss = first[0]
        moved = {name: item.detach() - before[name] for name, item in plain.parameters.items()}
        plain.entries.append(
            {
                "gradient_norm_used": gradient,
                "gradient_norm": gradient,
                "update_norm": with_total(moved)["model"],
                "activation_norm": outputs,
                "loss": loss,
                "batch_size": SIZE,
                "lr": LR,
            }
        )
    compare(cell, "LBFGS", reports, plain.entries)


# --- Manual optimization -----------------------------------------------------------------------


def manual_step(self: Any, batch: Any, *, clip: float, how: str) -> None:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(mse(self.net, batch))
    self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm=how)
    optimizer.step()


def manual_by_norm(self: Any, batch: Any, index: int) -> None:
    manual_step(self, batch, clip=0.1, how="norm")


def manual_by_value(self: Any, batch: Any, index: int) -> None:
    manual_step(self, batch, clip=0.01, how="value")


def manual_accumulated(self: Any, batch: Any, index: int) -> None:
    """Two backward passes a batch, and a step every other batch."""
    optimizer = self.optimizers()
    for half in (slice(None, 2), slice(2, None)):
        self.manual_backward(mse(self.net, [part[half] for part in batch]) / 4)
    if index % 2:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("mode", "training_step", "clip"),
    [("norm", manual_by_norm, by_norm), ("value", manual_by_value, by_value)],
)
def test_manual_optimization_with_clipping(
    cell: Any, mode: str, training_step: Step, clip: Callable[[Any], Any]
) -> None:
    reports = reports_of(module(sgd, training_step, manual=True))
    compare(cell, f"manual, clip by {mode}", reports, plain_loop(clip=clip))


def test_manual_accumulation(cell: Any) -> None:
    reports = reports_of(module(sgd, manual_accumulated, manual=True))
    plain = Plain()
    optimizer = torch.optim.SGD(plain.net.parameters(), lr=LR)
    for index, batch in enumerate(batches()):
        for half in (slice(None, 2), slice(2, None)):
            (plain.loss([part[half] for part in batch]) / 4).backward()
        if index % 2:
            plain.step(optimizer, raw=plain.gradients())
            optimizer.zero_grad()
    compare(cell, "manual, accumulated", reports, plain.entries)


def test_several_manual_steps_a_batch(cell: Any) -> None:
    def twice(self: Any, batch: Any, index: int) -> None:
        for _ in range(2):
            manual_by_norm(self, batch, index)

    reports = reports_of(module(sgd, twice, manual=True))
    plain = Plain()
    optimizer = torch.optim.SGD(plain.net.parameters(), lr=LR)
    for batch in batches():
        for _ in range(2):
            optimizer.zero_grad()
            plain.loss(batch).backward()
            raw = plain.gradients()
            by_norm(plain.net.parameters())
            plain.step(optimizer, raw=raw)
    compare(cell, "manual, two steps a batch", reports, plain.entries)


def test_a_manual_step_with_a_closure(cell: Any) -> None:
    def with_closure(self: Any, batch: Any, index: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse(self.net, batch)
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.step(closure=closure)

    reports = reports_of(module(sgd, with_closure, manual=True))
    compare(cell, "manual, closure", reports, plain_loop())


@pytest.mark.parametrize("how", ["norm", "value"])
def test_manual_optimization_with_two_optimizers(cell: Any, how: str) -> None:
    """As in adversarial training: each has a backward pass and a step of its own."""

    def two(self: Any) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=LR) for part in (self.net[0], self.net[2])]

    def alternating(self: Any, batch: Any, index: int) -> None:
        for optimizer, factor in zip(self.optimizers(), (1.0, 0.5), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(factor * mse(self.net, batch))
            self.clip_gradients(
                optimizer,
                gradient_clip_val=0.1 if how == "norm" else 0.01,
                gradient_clip_algorithm=how,
            )
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    reports = reports_of(module(two, alternating, manual=True))
    plain = Plain()
    parts = [plain.net[0], plain.net[2]]
    for batch in batches():
        raw: dict[str, Tensor] = {}
        used: dict[str, Tensor] = {}
        before = {name: item.detach().clone() for name, item in plain.parameters.items()}
        total = 0.0
        for part, factor in zip(parts, (1.0, 0.5), strict=True):
            loss = factor * plain.loss(batch)
            total += loss.item()
            gradients = torch.autograd.grad(loss, list(part.parameters()))
            names = [
                name for name, item in plain.parameters.items() if item in set(part.parameters())
            ]
            raw |= dict(zip(names, gradients, strict=True))
            size = torch.stack([item.norm() for item in gradients]).norm()
            clipped = [
                item * min(1.0, 0.1 / (float(size) + 1e-6))
                if how == "norm"
                else item.clamp(-0.01, 0.01)
                for item in gradients
            ]
            used |= dict(zip(names, clipped, strict=True))
            with torch.no_grad():
                for item, gradient in zip(part.parameters(), clipped, strict=True):
                    item.sub_(LR * gradient)
        moved = {name: item.detach() - before[name] for name, item in plain.parameters.items()}
        plain.entries.append(
            {
                "gradient_norm_used": with_total(used),
                "gradient_norm": with_total(raw),
                "update_norm": with_total(moved)["model"],
                "activation_norm": dict(plain.outputs),
                "loss": total,
                "batch_size": SIZE,
                "lr": LR,
            }
        )
    compare(cell, f"manual, two optimizers, clip by {how}", reports, plain.entries)


# --- Mixed precision ---------------------------------------------------------------------------


class Recorder:
    """An optimizer that writes down what it is given and what it does, in double precision."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.raw: list[Norms] = []
        self.losses: list[float] = []
        self.outputs: Norms = {}

    def optimizer(self, model: Any) -> Any:
        recorder = self

        class Recorded(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                result = closure() if closure is not None else None
                named = dict(model.named_parameters())
                before = {name: item.detach().double() for name, item in named.items()}
                used = with_total({name: item.grad for name, item in named.items()})
                super().step()
                moved = {
                    name: item.detach().double() - before[name] for name, item in named.items()
                }
                entry = {
                    "gradient_norm_used": used,
                    "gradient_norm": recorder.raw[-1],
                    "update_norm": with_total(moved)["model"],
                    "activation_norm": dict(recorder.outputs),
                    "loss": sum(recorder.losses) / len(recorder.losses),
                    "batch_size": SIZE * len(recorder.losses),
                    "lr": LR,
                }
                recorder.entries.append(entry)
                recorder.losses.clear()
                return result

        return Recorded(model.parameters(), lr=LR)

    def model(self) -> Any:
        recorder = self

        def training_step(self: Any, batch: Any, index: int) -> Tensor:
            values = batch[0]
            for name, layer in self.net.named_children():
                values = layer(values)
                if isinstance(layer, nn.Linear):
                    square = values.detach().double().square().sum(1).mean()
                    recorder.outputs[f"net.{name}"] = float(square.sqrt())
            loss: Tensor = (values - batch[1]).square().mean()
            recorder.losses.append(loss.item())
            return loss

        model = module(lambda model: recorder.optimizer(model), training_step)  # noqa: PLW0108

        def configure_gradient_clipping(optimizer: Any, **how: Any) -> None:
            named = model.named_parameters()
            recorder.raw.append(with_total({name: item.grad for name, item in named}))
            model.clip_gradients(optimizer, **how)

        model.configure_gradient_clipping = configure_gradient_clipping
        return model


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(cell: Any, precision: str) -> None:
    """On a CPU, Lightning turns 16-mixed into bf16-mixed."""
    recorder = Recorder()
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    reports = reports_of(recorder.model(), precision=precision, **options)
    compare(cell, precision, reports, recorder.entries)


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling(cell: Any, overflow: bool) -> None:
    """A scaler that works on a CPU too; the first steps overflow if its scale begins too high."""
    plugins = importlib.import_module("lightning.pytorch.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24 if overflow else 2.0**8)
    recorder = Recorder()
    reports = reports_of(
        recorder.model(),
        loader(12) if overflow else None,
        plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)],
        gradient_clip_val=0.1,
    )
    if overflow:
        skipped = len(recorder.raw) - len(recorder.entries)
        assert skipped > 0
        for entry in recorder.entries:
            entry["batch_size"] = SIZE
        recorder.entries[0].pop("loss")  # the recorder has those of the skipped steps in it
    compare(cell, "16-mixed with a scaler", reports, recorder.entries)


def test_a_fused_optimizer_unscales_for_itself(cell: Any) -> None:
    """Lightning shows its gradients with the scale still in them, and refuses to clip them."""
    plugins = importlib.import_module("lightning.pytorch.plugins")
    recorder = Recorder()
    model = recorder.model()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    reports = reports_of(model, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)])
    assert len(reports) == BATCHES
    mode = "16-mixed, fused optimizer"
    for report, raw, loss in zip(reports, recorder.raw, recorder.losses, strict=True):
        unscaled = {name: norm / 2.0**8 for name, norm in raw.items()}
        for quantity in ("gradient_norm", "gradient_norm_used"):
            cell.equal(mode, quantity, scoped(report, quantity), unscaled)
        cell.equal(mode, "loss", report.value("loss"), loss)
        cell.equal(mode, "batch_size", report.info.batch_size, SIZE)


# --- Several processes -------------------------------------------------------------------------

WORLD = 2


def of_both_ranks() -> Iterator[Any]:
    """The global batches: rank r takes every other sample, as a DistributedSampler gives them."""
    values, wanted = (torch.cat(parts) for parts in zip(*batches(2 * BATCHES), strict=True))
    for start in range(0, len(values), WORLD * SIZE):
        here = slice(start, start + WORLD * SIZE)
        yield values[here], wanted[here]


def plain_loop_of_both_ranks(clip: Callable[[Any], Any] | None = None) -> list[Entry]:
    plain = Plain()
    optimizer = torch.optim.SGD(plain.net.parameters(), lr=LR)
    for batch in of_both_ranks():
        optimizer.zero_grad()
        plain.loss(batch).backward()
        raw = plain.gradients()
        if clip is not None:
            clip(plain.net.parameters())
        plain.step(optimizer, raw=raw)
    return plain.entries


def train_in_parallel(strategy: str, clip: bool) -> list[gradwatch.Report]:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    model = module(sgd, automatic)
    if strategy == "ModelParallelStrategy":

        def configure_model() -> None:
            from torch.distributed.fsdp import fully_shard

            for part in (model.net[0], model.net[2], model.net):
                fully_shard(part, mesh=model.device_mesh["data_parallel"])

        model.configure_model = configure_model
        chosen: Any = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    else:
        chosen = DDPStrategy(process_group_backend="gloo")
    every = loader(2 * BATCHES).dataset
    sampler: Any = DistributedSampler(every, WORLD, int(os.environ["RANK"]), shuffle=False)
    data = DataLoader(every, batch_size=SIZE, sampler=sampler)
    settings = {"strategy": chosen, "devices": WORLD, "use_distributed_sampler": False}
    return reports_of(model, data, gradient_clip_val=0.1 if clip else None, **settings)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("strategy", ["DDPStrategy", "ModelParallelStrategy"])
def test_two_processes(cell: Any, on_ranks: Any, strategy: str, clip: bool) -> None:
    results = on_ranks(train_in_parallel, strategy, clip, joined=False)
    assert results[1] == [], "sinks are told on the first rank only"
    mode = f"{strategy}, clip by norm" if clip else strategy
    compare(cell, mode, results[0], plain_loop_of_both_ranks(by_norm if clip else None))

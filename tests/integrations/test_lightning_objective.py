"""The loss of a Lightning training step evaluated again, in real Trainers of both packages."""

import copy
import importlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.capture.probe.batch import LastBatch, ObjectiveError
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch_lightning.objective import TrainingStep

pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_sigint"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


@pytest.fixture
def own_sigint() -> Iterator[None]:
    """Lightning ignores Ctrl-C after the first one, for good."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def module_of(pl: Any) -> Any:
    accuracy = importlib.import_module("torchmetrics.classification").MulticlassAccuracy

    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
            )
            self.accuracy = accuracy(num_classes=3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            output = self.net(x)
            self.accuracy(output, y)
            loss = functional.cross_entropy(output, y)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict({"accuracy": self.accuracy, "batch": float(batch_idx)}, on_epoch=True)
            return {"loss": loss, "extra": 1}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Classifier()


def fit(pl: Any, moment: str) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    module = module_of(pl)
    seen: list[float] = []
    batches = LastBatch()

    class Probe(pl.Callback):  # type: ignore[misc]
        def look(self, now: str) -> None:
            if now == moment:
                objective = TrainingStep(module, batches)
                with undisturbed(module):
                    parameters = objective.parameters()
                    loss = objective.loss(parameters)
                    wanted = list(parameters.values())
                    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
                    square = cast(Tensor, sum(item.square().sum() for item in gradients))
                    torch.autograd.grad(square, wanted)
                seen.append(loss.item())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            batches.tell(batch)
            self.look("before the step")

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.look("before the optimizer")

        def on_train_batch_end(self, *_: Any) -> None:
            self.look("after the step")
            batches.release()

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Probe()],
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    state = {**module.state_dict(), **trainer.logged_metrics, **trainer.callback_metrics}
    return {name: copy.deepcopy(item) for name, item in state.items()}, seen


@pytest.mark.parametrize("moment", ["before the step", "before the optimizer", "after the step"])
def test_a_fit_with_probes_is_bit_identical(
    pl: Any, moment: str, assert_identical: Callable[..., None]
) -> None:
    plain, nothing = fit(pl, "never")
    probed, seen = fit(pl, moment)
    assert_identical(plain, probed)
    assert (len(nothing), len(seen)) == (0, 6)
    assert {"accuracy", "loss_epoch"} <= plain.keys()


def batch_of(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 6), torch.randint(3, (size,))


def test_it_needs_no_trainer_and_leaves_the_methods_alone(pl: Any) -> None:
    module = module_of(pl).eval()
    batches = LastBatch()
    batches.tell(batch_of())
    before = dict(vars(module))
    with undisturbed(module):
        whole = TrainingStep(module, batches).loss()
        halves = [TrainingStep(module, batches).loss(rows=rows) for rows in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())
    assert vars(module) == before


def test_a_step_that_raises_gets_its_logging_back(pl: Any) -> None:
    module = module_of(pl)
    batches = LastBatch()
    batches.tell((torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(RuntimeError, match="shapes"):
        TrainingStep(module, batches).loss()
    assert not {"log", "log_dict", "print"} & vars(module).keys()


def test_steps_that_cannot_be_evaluated(pl: Any) -> None:
    class Manual(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = nn.Linear(6, 3)

        def training_step(self, batch: Any) -> None:
            raise AssertionError("would step the optimizers")

    class Iterating(pl.LightningModule):  # type: ignore[misc]
        def training_step(self, dataloader_iter: Any) -> None:
            next(dataloader_iter)

    class Skipping(pl.LightningModule):  # type: ignore[misc]
        def training_step(self, batch: Any) -> None:
            return None

    batches = LastBatch()
    batches.tell(batch_of())
    cases = {Manual: "manual optimization", Iterating: "dataloader_iter", Skipping: "no loss"}
    for kind, reason in cases.items():
        with pytest.raises(ObjectiveError, match=reason):
            TrainingStep(kind(), batches).loss()

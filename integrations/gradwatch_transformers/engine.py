"""What can still be seen under DeepSpeed, which keeps gradients and steps to itself."""

from collections.abc import Callable, Iterable
from typing import Any, Final

from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from gradwatch import Monitor, Reading, StepView
from gradwatch.monitors import ActivationNorm, LossValue, LrBatchRatio

STATEMENT: Final = (
    "not measured under DeepSpeed: {metrics}. Its engine clips, steps and clears the gradients "
    "inside of backward(), and keeps the parameters in flat partitions; the norm of the whole "
    "gradient is the Trainer's own grad_norm"
)
_VISIBLE: Final = (LossValue, LrBatchRatio, ActivationNorm)


def is_deepspeed(optimizer: Any) -> bool:
    """Whether an engine of DeepSpeed takes the steps.

    Args:
        optimizer: what the Trainer passes to its callbacks.

    Returns:
        True if accelerate's optimizer is one of DeepSpeed.
    """
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper" or (
        getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", None)
        == DistributedType.DEEPSPEED
    )


class EngineOptimizer(Optimizer):
    """Stands for the optimizer inside an engine, so that a watch can count its steps.

    Args:
        model: whose parameters the engine trains.
        engine: accelerate's wrapper, which knows the learning rate.
    """

    def __init__(self, model: nn.Module, engine: Any) -> None:
        super().__init__([{"params": list(model.parameters())}], {"lr": 0.0})
        self._engine = engine
        self.read_lr()

    def read_lr(self) -> None:
        """Takes over the learning rate; the engine changes it at the end of its step."""
        self.param_groups[0]["lr"] = self._engine.param_groups[0]["lr"]

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Says that the engine has stepped; changes nothing."""


class NotMeasured(Monitor):
    """Says which metrics an engine keeps to itself.

    Args:
        metrics: their names.
    """

    def __init__(self, metrics: Iterable[str]) -> None:
        self.metrics = tuple(metrics)  # type: ignore[misc]

    @override
    def read(self, view: StepView) -> Iterable[Reading]:
        view.note(STATEMENT.format(metrics=", ".join(self.metrics)))
        return ()


def visible(monitors: Iterable[Monitor]) -> list[Monitor]:
    """The monitors that need neither gradients nor parameters, and a statement of the others.

    Args:
        monitors: what the user wants.

    Returns:
        Monitors that tell the truth under an engine.
    """
    wanted = list(monitors)
    kept: list[Monitor] = [item for item in wanted if type(item) in _VISIBLE]
    lost = [metric for item in wanted if item not in kept for metric in item.metrics]
    return [*kept, NotMeasured(lost)] if lost else kept

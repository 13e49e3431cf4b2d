"""The loss of a LightningModule's own training step, for probes."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradwatch.capture.probe.batch import LastBatch, ObjectiveError, fresh
from gradwatch.capture.probe.objective import Objective
from gradwatch.numerics.hvp import Hessian

LOGGING: Final[tuple[str, ...]] = ("log", "log_dict", "print")
"""What a training step may call that others see."""


class TrainingStep(Objective):
    """`pl_module.training_step(batch, batch_idx)` with its logging silenced.

    What the step writes to `self.logger.experiment` itself is written again.

    Args:
        pl_module: a LightningModule, of either package.
        batches: told the batch of the step under way.
        batch_idx: gives its number.
    """

    def __init__(
        self, pl_module: nn.Module, batches: LastBatch, batch_idx: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(pl_module)
        self._batches = batches
        self._batch_idx = batch_idx
        self._autocasts = True

    @override
    def inputs(self) -> Any:
        return self._batches.batch

    @override
    @contextmanager
    def hessian(
        self,
        parameters: Mapping[str, Tensor],
        rows: slice | None = None,
        *,
        by: Sequence[Tensor] | None = None,
    ) -> Iterator[Hessian]:
        # The Trainer's own autocast would come after the one that keeps second derivatives exact.
        self._autocasts = any(item.dtype != torch.float32 for item in parameters.values())
        try:
            with super().hessian(parameters, rows, by=by) as found:
                yield found
        finally:
            self._autocasts = True

    def _evaluate(self, rows: slice | None) -> Any:
        if not getattr(self.model, "automatic_optimization", True):
            raise ObjectiveError(
                "the training step of manual optimization cannot be evaluated again, as it steps "
                "the optimizers itself; give a loss_fn"
            )
        batch = fresh(self._batches.batch, rows)
        with silenced(self.model), _precision(self.model), self._autocast():
            return _loss_in(self._call(batch))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocasts:
            return nullcontext()
        kind = next((item.device.type for item in self.model.parameters()), "cpu")
        return torch.autocast(kind, enabled=False)

    def _call(self, batch: Any) -> Any:
        step: Any = self.model.training_step
        names = list(inspect.signature(step).parameters)
        if "dataloader_iter" in names:
            raise ObjectiveError(
                "a training step that draws its batches from dataloader_iter cannot be evaluated "
                "again; give a loss_fn"
            )
        return step(batch) if len(names) == 1 else step(batch, self._batch_idx())


@contextmanager
def silenced(pl_module: nn.Module) -> Iterator[None]:
    """Lets a LightningModule log nothing.

    Lightning refuses to log outside of its loops, and what is logged inside would count twice. The
    instance gets methods that do nothing, past `nn.Module.__setattr__`, and loses them again.

    Args:
        pl_module: a LightningModule.

    Yields:
        None.
    """
    attributes = vars(pl_module)
    own = {name: attributes[name] for name in LOGGING if name in attributes}
    attributes.update(dict.fromkeys(LOGGING, _do_nothing))
    try:
        yield
    finally:
        for name in LOGGING:
            attributes.pop(name, None)
        attributes.update(own)


def _precision(pl_module: nn.Module) -> AbstractContextManager[Any]:
    """What the Trainer puts around its training steps.

    Not where it scales the loss: unscaled, gradients of a float16 loss would vanish.
    """
    plugin = getattr(getattr(pl_module, "_trainer", None), "precision_plugin", None)
    if plugin is None or getattr(plugin, "scaler", None) is not None:
        return nullcontext()
    context: AbstractContextManager[Any] = plugin.train_step_context()
    return context


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _loss_in(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ObjectiveError("the training step returned no loss for this batch")
    return loss

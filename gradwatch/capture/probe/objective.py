"""The training loss as a function of the parameters, to be evaluated again by probes.

with undisturbed(model, pause=...):
    parameters = objective.parameters()
    loss = objective.loss(parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradwatch.capture.forward.gate import batch_size, own_loss
from gradwatch.capture.model.names import unwrap_model
from gradwatch.capture.probe.batch import Call, LastBatch, ObjectiveError, fresh
from gradwatch.capture.probe.substitution import substituted
from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.sharding import is_sharded

_INDEPENDENT: Final = (
    "the loss does not depend on the parameters of the model: loss_fn must call the model that it "
    "is given, and the model must reach its parameters through its modules"
)


class Objective(ABC):
    """The training loss on one batch, for other parameters and on copies of the buffers.

    To be evaluated inside `undisturbed`. Neither the model's parameters nor their `.grad` nor its
    buffers are touched.

    Args:
        model: the module that is trained, wrapped or not; the wrappers are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap_model(model)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters as they are now, to be differentiated by.

        They are copies: hooks on the model's parameters, the user's, those of wrappers and of this
        watch, see nothing of it, and a forward that changes its parameters in place changes these.

        Returns:
            Name and leaf tensor; a tied parameter once.

        Raises:
            ObjectiveError: if the parameters are sharded, or the model is compiled TorchScript.
        """
        named = dict(self.model.named_parameters())
        modules = list(self.model.modules())
        if any(isinstance(item, torch.jit.ScriptModule) for item in modules):
            raise ObjectiveError("the loss of a TorchScript module cannot be evaluated again")
        flat = any(type(item).__name__ == "FullyShardedDataParallel" for item in modules)
        if flat or any(map(is_sharded, named.values())):
            raise ObjectiveError("the loss cannot be evaluated again with sharded parameters")
        return {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in named.items()
            if parameter.requires_grad
        }

    def loss(
        self, parameters: Mapping[str, Tensor] | None = None, rows: slice | None = None
    ) -> Tensor:
        """Evaluates the loss.

        Args:
            parameters: by name, instead of the model's own; those that are left out are the
                model's.
            rows: the examples of the batch to use; None for all.

        Returns:
            () tensor with its graph [L].

        Raises:
            ObjectiveError: if there is no batch, or no scalar comes out.
        """
        given = self.parameters() if parameters is None else parameters
        loss: Tensor = self._with(given, lambda: _scalar(self._evaluate(rows)))
        return loss

    def gradient(
        self, parameters: Mapping[str, Tensor], rows: slice | None = None
    ) -> dict[str, Tensor]:
        """The gradient of the loss.

        Activation checkpoints compute parts of the forward again in the backward: the parameters
        must stay in their place until then.

        Args:
            parameters: by name, leaf tensors that require gradients.
            rows: the examples of the batch to use; None for all.

        Returns:
            Name and gradient of each, zeros where the loss does not depend on it [L/P].

        Raises:
            ObjectiveError: if there is no batch, or no scalar comes out.
        """

        def differentiate() -> tuple[Tensor, ...]:
            loss = _scalar(self._evaluate(rows))
            wanted = list(parameters.values())
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            if all(item is None for item in found):
                raise ObjectiveError(_INDEPENDENT)
            return tuple(
                torch.zeros_like(one) if item is None else item
                for one, item in zip(wanted, found, strict=True)
            )

        return dict(zip(parameters, self._with(parameters, differentiate), strict=True))

    @contextmanager
    def hessian(
        self,
        parameters: Mapping[str, Tensor],
        rows: slice | None = None,
        *,
        by: Sequence[Tensor] | None = None,
    ) -> Iterator[Hessian]:
        """The Hessian of the loss, on one kept graph, as long as the block lasts.

        Activation checkpoints compute parts of the forward again in each product, so that the
        parameters must stay in their place until the last one.

        Args:
            parameters: by name, leaf tensors.
            rows: the examples of the batch to use; None for all.
            by: those of them to differentiate by; None for all.

        Yields:
            The Hessian.

        Raises:
            ObjectiveError: if there is no batch, or no scalar comes out, or the loss does not
                depend on the parameters.
        """
        with substituted(self.model, parameters):
            loss = _scalar(self._evaluate(rows))
            if not loss.requires_grad:
                raise ObjectiveError(_INDEPENDENT)
            yield Hessian(loss, [*parameters.values()] if by is None else by)

    def _with(self, parameters: Mapping[str, Tensor], evaluate: Callable[[], Any]) -> Any:
        """Calls `evaluate` while the model has these parameters and copies of its buffers."""
        with substituted(self.model, parameters):
            return evaluate()

    @property
    def examples(self) -> int:
        """Number of examples in the batch.

        Raises:
            ObjectiveError: if there is no batch, or it shows no examples.
        """
        count = batch_size(self.inputs())
        if count == 0:
            raise ObjectiveError("the batch holds no tensor whose first dimension counts examples")
        return count

    @abstractmethod
    def inputs(self) -> Any:
        """The batch, as the loop has it: not to be changed."""

    @abstractmethod
    def _evaluate(self, rows: slice | None) -> Any:
        """Calls the model on the batch; the model has the tensors to be used."""


class LossFunction(Objective):
    """The user's own `loss_fn(model, batch)`.

    Args:
        model: the module that is trained.
        loss_fn: gives the loss that is trained on; it must call the model that it is given.
        batches: the batch of the step under way.
        probe_batch: a batch to use instead, always the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batches: LastBatch,
        probe_batch: Any = None,
    ) -> None:
        super().__init__(model)
        self._loss_fn = loss_fn
        self._batches = batches
        self._probe_batch = probe_batch

    @override
    def inputs(self) -> Any:
        return self._batches.batch if self._probe_batch is None else self._probe_batch

    def _evaluate(self, rows: slice | None) -> Any:
        given = fresh(self.inputs(), rows)
        if self._probe_batch is not None or self._batches.is_told:
            return self._loss_fn(self.model, given)
        try:
            return self._loss_fn(self.model, given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ObjectiveError(
                f"loss_fn failed on what the model was called with ({type(error).__name__}: "
                f"{error}); if its batch is more than that, call watch.observe(batch=batch) "
                "before the optimizer steps"
            ) from error


class OwnLoss(Objective):
    """The loss that the model itself returns, as those of transformers do given labels.

    Args:
        model: the module that is trained.
        batches: what it was called with in the step under way.
    """

    def __init__(self, model: nn.Module, batches: LastBatch) -> None:
        super().__init__(model)
        self._batches = batches

    def _call(self) -> Call:
        """What the model is called with."""
        return self._batches.call

    @override
    def inputs(self) -> Any:
        call = self._call()
        return call.args, call.kwargs

    def _evaluate(self, rows: slice | None) -> Any:
        call = self._call().fresh(rows)
        loss = own_loss(self.model(*call.args, **call.kwargs))
        if loss is None:
            raise ObjectiveError(
                f"the output of {type(self.model).__name__} has no loss; give a loss_fn"
            )
        return loss


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ObjectiveError(f"the loss must be a scalar tensor, got {_shown(value)}")
    return value.reshape(())


def _shown(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"

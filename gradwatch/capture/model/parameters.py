"""The parameters that the optimizers hold, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture.model.names import canonical
from gradwatch.errors import AttachError


class ParameterTable:
    """Names and owners of the optimized parameters, each once however often it is tied.

    Args:
        model: the unwrapped model.
        optimizers: torch optimizers.

    Raises:
        AttachError: if the model has no parameters, or an optimizer holds none of them.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers: tuple[Optimizer, ...] = tuple(optimizers)
        self._of_model = {canonical(name): item for name, item in model.named_parameters()}
        self._names = {id(item): name for name, item in self._of_model.items()}
        if not self._names:
            raise AttachError(
                f"the model, a {type(model).__name__}, has no parameters, so there is no training "
                "to watch; pass the module that is trained"
            )
        if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise AttachError(
                f"optimizer must hold different optimizers, got the same "
                f"{type(optimizers[0]).__name__} twice; list each once"
            )
        for optimizer in optimizers:
            if not hasattr(optimizer, "param_groups"):
                raise AttachError(
                    f"optimizer must be a torch.optim.Optimizer or a list of them, got the "
                    f"{type(optimizer).__name__} {optimizer!r}; pass the optimizer that is stepped"
                )
            held = self.of(optimizer)
            if not any(id(parameter) in self._names for parameter in held.values()):
                raise AttachError(
                    f"{type(optimizer).__name__} holds {len(held)} parameters, none of which "
                    f"belongs to the model, a {type(model).__name__}; pass the optimizer of this "
                    "model, made after the model was moved, wrapped or sharded"
                )

    def release(self) -> None:
        """Lets go of the optimizers and their parameters."""
        self._optimizers = ()
        self._of_model = {}

    def all_known(self) -> dict[str, Tensor]:
        """All of the model, and of the optimizers: also those that they may be given later."""
        return {**self._of_model, **self.everything()}

    def everything(self) -> dict[str, Tensor]:
        """The parameters of all optimizers, by name."""
        found: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            found.update(self.of(optimizer))
        return found

    def of(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The parameters of one optimizer as they are now, also those added later.

        Args:
            optimizer: one of the optimizers.

        Returns:
            Name and parameter, in the order of the groups; a parameter that is not the model's
            is called "group<i>.<j>" by its place.
        """
        found: dict[str, Tensor] = {}
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = self._names.get(id(parameter))
                found[name if name is not None else f"group{number}.{place}"] = parameter
        return found


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether an optimizer has taken steps; Adagrad has a state before its first one.

    Args:
        optimizer: a torch optimizer, outside a step.

    Returns:
        True if it has a state that does not count 0 steps.
    """
    return any(
        not isinstance(state, Mapping) or float(state.get("step", 1)) > 0
        for state in optimizer.state.values()
    )


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """What the first parameter group says of momentum, its kind, sign, betas and weight decay.

    Args:
        optimizer: a torch optimizer.

    Returns:
        The fields of `StepInfo` of those names; None where a setting does not exist or is a
        tensor, which would cost a host read.
    """
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    betas = group.get("betas") or ()
    momentum = _number(group.get("momentum"))
    return {
        "momentum": momentum,
        # Without momentum torch's SGD leaves it out of account.
        "dampening": _number(group.get("dampening")) if momentum else None,
        "nesterov": momentum is not None and group.get("nesterov") is True,
        "maximize": group.get("maximize") is True,
        "betas": tuple(map(float, betas)) if _all_numbers(betas) and betas else None,
        "weight_decay": _number(group.get("weight_decay")),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _all_numbers(values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)

"""Names as the user wrote them, whatever wraps the model."""

from typing import Any, Final

from torch import nn

WRAPPER_PREFIXES: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile`, DistributedDataParallel or DataParallel.

    Args:
        model: a module, wrapped or not.

    Returns:
        The innermost module that is not a wrapper.
    """
    return wrappers_of(model)[-1]


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """What the user passed and everything it wraps, from the outside in.

    Args:
        model: a module, wrapped or not.

    Returns:
        At least the module itself, which is last if it wraps nothing.
    """
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    found = [model]
    while True:
        outer = found[-1]
        if isinstance(compiled := getattr(outer, "_orig_mod", None), nn.Module):
            found.append(compiled)
        elif isinstance(outer, parallel):
            found.append(outer.module)
        else:
            return found


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs a compiled function."""
    return hasattr(model, "_orig_mod") or is_compiled_in_place(model)


def is_compiled_in_place(model: nn.Module) -> bool:
    """Whether `model.compile()` was called, so that its own hooks are compiled with it."""
    return getattr(model, "_compiled_call_impl", None) is not None


def forward_root(model: nn.Module) -> nn.Module | None:
    """The module whose calls are the forwards of a model, with hooks that run outside of graphs.

    Args:
        model: what the user calls.

    Returns:
        The compiled wrapper of a compiled model, `nn.DataParallel` rather than the module that
        it copies, else the user's own module; None if all hooks would be compiled.
    """
    wrappers = wrappers_of(model)
    if any(map(is_compiled, wrappers)):
        return None if is_compiled_in_place(model) else model
    parallel = [item for item in wrappers if isinstance(item, nn.DataParallel)]
    return parallel[0] if parallel else wrappers[-1]


def compiled_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that run inside a compiled region of a model, where hooks would break it.

    Args:
        model: an unwrapped model.

    Returns:
        The compiled modules and all that they contain.
    """
    compiled = [module for module in model.modules() if is_compiled(module)]
    return {part for module in compiled for part in module.modules()}


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a wrapper such as accelerate's.

    Args:
        optimizer: an optimizer or a wrapper that holds one as `.optimizer`.

    Returns:
        The innermost optimizer.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def canonical(name: str) -> str:
    """A parameter or module name without the prefixes that wrappers add.

    Args:
        name: as `named_parameters()` or `named_modules()` gives it.

    Returns:
        The name in the user's own code.

    Example:
        >>> canonical("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "").removesuffix(prefix.removesuffix("."))
    return name.removesuffix(".")


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model once, by canonical name.

    A wrapper and the module inside it share a name; the module inside is the one listed.

    Args:
        model: an unwrapped model.

    Returns:
        Pairs of name and module; the model itself has the name "".
    """
    return list({canonical(name): module for name, module in model.named_modules()}.items())

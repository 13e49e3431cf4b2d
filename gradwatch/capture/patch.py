"""Replacing a function of torch for as long as somebody listens."""

from collections.abc import Callable
from typing import Any


class Patch:
    """One wrapper around a function, shared by all watches that are open.

    Watches may be closed in any order, so none can put back what it found itself: the wrapper
    comes with the first listener and goes with the last.

    Args:
        owner: the module that the function is looked up in.
        name: of the function.
        wrap: makes the wrapper, from the function and from what tells the listeners.
    """

    def __init__(
        self, owner: Any, name: str, wrap: Callable[[Any, Callable[..., None]], Any]
    ) -> None:
        self._owner = owner
        self._name = name
        self._wrap = wrap
        self._listeners: list[Callable[..., None]] = []
        self._original: Any = None
        self._wrapper: Any = None

    def add(self, listener: Callable[..., None]) -> None:
        """Tells `listener` from now on.

        Args:
            listener: called as the wrapper calls its second argument.
        """
        if not self._listeners:
            self._install()
        self._listeners.append(listener)

    def remove(self, listener: Callable[..., None]) -> None:
        """Tells `listener` no more; the last one puts the function back.

        A wrapper that somebody else has wrapped meanwhile stays, and does nothing.

        Args:
            listener: as given to `add`; may be removed again.
        """
        if listener not in self._listeners:
            return
        self._listeners.remove(listener)
        if not self._listeners and getattr(self._owner, self._name) is self._wrapper:
            setattr(self._owner, self._name, self._original)

    def _install(self) -> None:
        # A list of its own: a wrapper that could not be taken off must not tell twice.
        listeners: list[Callable[..., None]] = []
        self._listeners = listeners

        def tell(*arguments: Any) -> None:
            for listener in tuple(listeners):
                listener(*arguments)

        self._original = getattr(self._owner, self._name)
        self._wrapper = self._wrap(self._original, tell)
        setattr(self._owner, self._name, self._wrapper)

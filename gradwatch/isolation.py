"""A part that fails is reported once and switched off; the training goes on."""

import logging
import traceback
from collections.abc import Callable, Iterable
from typing import Final, Literal, ParamSpec, TypeVar

from gradwatch.errors import AdviceError, ConfigError, GradwatchError

OnError = Literal["disable", "raise"]
P = ParamSpec("P")
T = TypeVar("T")

logger: Final = logging.getLogger("gradwatch")
"""The one logger of the package."""


class KnownLimitError(GradwatchError):
    """A part cannot do its work in this training; the message says why and what to do."""


class Isolation:
    """Runs parts of the watch so that none can stop the training.

    Args:
        on_error: `disable` reports a failing part once and switches it off; `raise` lets the
            error through, for tests.

    Attributes:
        failures: name of each part that is off, with what happened.
        elsewhere: the parts that are known to have failed on some rank, this one or another.
        agreed: those of them that all ranks know of, all since the same step.

    Raises:
        ConfigError: if `on_error` is neither.
    """

    def __init__(self, on_error: OnError = "disable") -> None:
        if on_error not in {"disable", "raise"}:
            raise ConfigError(f"on_error must be 'disable' or 'raise', got {on_error!r}")
        self.on_error = on_error
        self.failures: dict[str, str] = {}
        self.elsewhere: set[str] = set()
        self.agreed: frozenset[str] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each part that is off."""
        return tuple(f"{part} is off: {what}" for part, what in self.failures.items())

    def run(
        self, part: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Calls `function`, unless the part is off.

        Args:
            part: name of the part, as the user knows it.
            function: what to call.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            Its result, or None if the part is off or just failed.

        Raises:
            AdviceError: if `function` raises it.
        """
        if part in self.failures:
            return None
        try:
            return function(*args, **kwargs)
        except AdviceError:  # the user asked to be stopped by a recommendation
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._switch_off(part, error)
            return None

    def hear(self, parts: Iterable[str]) -> None:
        """Switches off what has failed on any rank.

        Args:
            parts: the parts that have failed somewhere, here or on another rank.
        """
        for part in parts:
            if part not in self.elsewhere:
                self.elsewhere.add(part)
                if part not in self.failures:
                    self.failures[part] = "it failed on another rank"
                    logger.warning(
                        "%s failed on another rank and is switched off on all; the message of "
                        "that rank says why. The training goes on without it.",
                        part,
                    )

    def agree(self) -> None:
        """Called at the same step on all ranks, when all have heard the same."""
        self.agreed = frozenset(self.elsewhere)

    def _switch_off(self, part: str, error: Exception) -> None:
        if isinstance(error, KnownLimitError):  # not a defect that should be reported
            self.failures[part] = str(error)
            # Not the error itself: whoever keeps the record would keep its frames and tensors.
            logger.warning("%s is switched off: %s.", part, self.failures[part])
            return
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        self.failures[part] = what
        logger.warning(
            "%s failed and is switched off; the training goes on without it. %s (%s, line %d). "
            "If the part is gradwatch's own, please report this message with the traceback that "
            "watch(..., on_error='raise') shows.",
            part,
            what,
            last.filename,
            last.lineno,
        )

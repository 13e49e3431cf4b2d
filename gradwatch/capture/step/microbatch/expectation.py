"""Whether a step will have several independent gradients, so that it is worth to listen to them."""

from typing import Protocol

from gradwatch.numerics.sharding import world_size


class Replicas(Protocol):
    """The processes that train a model together.

    Attributes:
        joint: what they know is told to one another.
        replicas: number of different batches that a step is made of.
    """

    joint: bool
    replicas: int


class Expectation:
    """Learns from the steps so far how many micro-batches a step has.

    Args:
        ranks: the processes that train the model together.
    """

    def __init__(self, ranks: Replicas) -> None:
        self._ranks = ranks
        self._tried = False
        self._since = 0
        self._forwards_per_step = 0.0
        self._forwards_per_part = 1.0

    def forwards_seen(self, forwards: int, step: int) -> None:
        """Training forwards have been counted, and are counted anew from now on.

        Args:
            forwards: since the last call.
            step: optimizer steps finished now.
        """
        if step > self._since and forwards > 0:
            self._forwards_per_step = forwards / (step - self._since)
        self._since = step

    def parts_seen(self, forwards: int, parts: int) -> None:
        """The gradients of a step have been listened to.

        Args:
            forwards: of the step.
            parts: micro-batches found on this rank, 0 if it could not be done.
        """
        self._tried = True
        if parts > 0:  # a contrastive loss has two forwards for one gradient, and so has SAM
            self._forwards_per_part = max(1.0, forwards / parts)

    @property
    def parts(self) -> int:
        """Independent gradients to be expected in a step, over micro-batches and ranks."""
        return 1 if self.alone else self._mine * self.replicas

    @property
    def _mine(self) -> int:
        # Rounded: a step that a loss scaler skipped leaves a forward without a step.
        return max(1, round(self._forwards_per_step / self._forwards_per_part))

    def may_be(self, microbatches: int) -> bool:
        """Whether a step may have so many micro-batches on this rank; the first step tells.

        Args:
            microbatches: how many.
        """
        return not self.alone and (self._mine >= microbatches or not self._tried)

    @property
    def worth_trying(self) -> bool:
        """There may be several; the first step tells."""
        return not self.alone and (self.parts > 1 or not self._tried)

    @property
    def replicas(self) -> int:
        """Ranks that the step's gradient is an average over."""
        return self._ranks.replicas if self._ranks.joint else 1

    @property
    def alone(self) -> bool:
        """There are other processes, and what they know is not told to this one."""
        return not self._ranks.joint and world_size() > 1

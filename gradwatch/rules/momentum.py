"""The knob `momentum`: so much of it that gradient noise makes the training unstable."""

from collections.abc import Iterable

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.noise_instability import noise_unstable


class Momentum(Rule):
    """Recommends a smaller momentum where gradient noise makes the training unstable because of it.

    The limit of the learning rate of SGD with momentum b is
    `2 (1+b) l/(l² + k s² (1+b)/(1-b))`: b = 0.9 multiplies the noise `k s²` along the top
    eigenvector by 19, which is where small batches hurt. It speaks if the learning rate is 1.2 or
    more of that in three readings while it is stable without the noise, the smoothed loss rose by
    more than 5 % over them, and the momentum is 0.5 or more. Otherwise the same is a matter of
    `BatchSize` or, where no batch helps, of `LearningRate`; only one of the three speaks.

    Silent wherever the curvature is, see `gradwatch.rules.curvature`.

    References:
        Jastrzebski et al. 2020, arXiv:2002.09572, after Wu et al. 2018; the limit is derived.
    """

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        state = noise_unstable(history)
        if state is not None and state.remedy == "momentum":
            yield state.recommend()

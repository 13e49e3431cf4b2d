"""Before training: learning rate, batch size, steps, dropout and width from the gradient bound.

    from gradwatch import plan

    print(plan.network({"narrow": narrow, "wide": wide}, batches, loss_fn, target=0.05))

The functions turn the bound of stochastic gradient descent round (`theory.gradient_convergence`).
The target is a mean square of the gradient of the training objective; nothing here is about test
error. Constants are those at initialisation; along a training they change by factors, up or down (7
to 30 times up in one experiment): learning rate and steps may be off either way. Measure again
during the training.
"""

from gradwatch.plan.candidates import network
from gradwatch.plan.choice import (
    Constants,
    batch_size,
    dropout,
    learning_rate,
    same_convergence_family,
    steps,
)
from gradwatch.plan.table import Plan, PlanRow

__all__ = [
    "Constants",
    "Plan",
    "PlanRow",
    "batch_size",
    "dropout",
    "learning_rate",
    "network",
    "same_convergence_family",
    "steps",
]

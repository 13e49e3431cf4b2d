"""Before training: learning rate, batch size, steps, dropout and width from the gradient bound.

    from gradwatch import plan

    print(plan.network({"narrow": narrow, "wide": wide}, batches, loss_fn, target=0.05))

The functions turn the bound of stochastic gradient descent round (`theory.gradient_convergence`).
The target is a mean square of the gradient of the training objective; nothing here is about test
error. Constants measured at initialisation are 7 to 30 times below later values: use them to
compare, and measure again during training.
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

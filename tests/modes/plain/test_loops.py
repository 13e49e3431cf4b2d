"""However the loop is written, the reports are about its optimizer steps."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, Books, MakeBooks

FAMILY = "Plain PyTorch: loops"
BATCH = 5


def test_a_plain_loop(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(AdamW)
    run.train()
    agrees("plain loop", run)


def test_without_the_options_nothing_is_guessed(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(track_loss=False, track_clipping=False)
    run.train()
    agrees(
        "plain loop, neither track_loss nor track_clipping",
        run,
        loss="computed outside the model",
        gradient_norm="cannot see whether gradients are clipped",
    )


def test_a_scheduler(books: "MakeBooks", agrees: "Agrees") -> None:
    """The learning rate of a step is the one that it was taken with."""
    run = books()
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, gamma=0.5)
    for _ in range(3):
        run.train(1)
        schedule.step()
    agrees("learning rate schedule", run)


def test_accumulation(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(Adam)
    for _ in range(3):
        losses = []
        for _ in range(4):
            loss = run.loss() / 4
            loss.backward()
            losses.append(loss.item())
        run.step(loss=sum(losses), batch_size=4 * BATCH)
        run.optimizer.zero_grad()
    agrees("gradient accumulation", run)


def test_accumulation_of_what_the_user_tells(books: "MakeBooks", agrees: "Agrees") -> None:
    """Unequal parts, and gradients that are set to zero instead of taken away."""
    run = books(track_loss=False, track_clipping=False)
    for epoch in range(3):
        for part in (5, 2):
            loss = run.loss(part)
            loss.backward()
        run.watch.observe(loss=loss, batch_size=100, epoch=epoch / 2)
        run.step(loss=loss.item(), batch_size=100, epoch=epoch / 2)
        run.optimizer.zero_grad(set_to_none=False)
    agrees("gradient accumulation, told by watch.observe", run)


def test_observe_before_backward(books: "MakeBooks", agrees: "Agrees") -> None:
    """Before backward there is no gradient, so nothing is known of clipping."""
    run = books(track_loss=False, track_clipping=False)
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.loss()
        run.watch.observe(loss=loss)
        loss.backward()
        run.step(loss=loss.item())
    agrees("watch.observe before backward", run, gradient_norm="cannot see whether")


def with_closure(run: "Books", *, keyword: bool = False, evaluated_again: int = 0) -> "Books":
    evaluations: list[float] = []
    for _ in range(3):
        values = torch.randn(BATCH, 6)
        losses: list[float] = []
        first: dict[str, float] = {}

        def closure(
            values: Tensor = values,
            losses: list[float] = losses,
            first: dict[str, float] = first,
        ) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss(values=values)
            loss.backward()
            if losses:
                evaluations.append(loss.item())
            else:
                run.about_to_step()
                first.update(run.activations)
            losses.append(loss.item())
            return loss

        if keyword:
            run.optimizer.step(closure=closure)  # type: ignore[arg-type]
        else:
            run.optimizer.step(closure)  # type: ignore[arg-type]
        run.activations = first  # a line search looks at other parameters than the step began with
        run.stepped(loss=losses[0])
    assert len(evaluations) >= evaluated_again
    return run


def test_a_closure(books: "MakeBooks", agrees: "Agrees") -> None:
    agrees("closure", with_closure(books(Adam)))


def test_a_closure_by_keyword(books: "MakeBooks", agrees: "Agrees") -> None:
    run = with_closure(books(track_loss=False), keyword=True)
    agrees("closure by keyword, without track_loss", run)


def test_lbfgs(books: "MakeBooks", agrees: "Agrees") -> None:
    """The line search evaluates the closure many times; the first one is where it began."""

    def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    run = with_closure(books(lbfgs), evaluated_again=3)
    agrees("closure, LBFGS with line search", run)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(values)))
        return output


def test_a_tied_weight(books: "MakeBooks", agrees: "Agrees") -> None:
    torch.manual_seed(0)
    run = books(model=Tied())
    run.train()
    assert [len(entry.used) for entry in run.entries] == [3, 3, 3]
    agrees("tied weights", run)


def test_frozen_and_unused_parameters(books: "MakeBooks", agrees: "Agrees") -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(4)))
    run = books(Adam, model)
    run.train()
    assert run.watch.model_info.frozen == ("0.bias",)
    assert any("no gradient reached unused" in note for note in run.told.reports[0].notes)
    agrees("frozen and unused parameters", run)


def test_parameters_that_are_unfrozen_on_the_way(books: "MakeBooks", agrees: "Agrees") -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    model[0].requires_grad_(False)
    run = books(Adam, model)
    for number in range(4):
        model[0].requires_grad_(number >= 2)
        run.train(1)
    assert [len(entry.used) for entry in run.entries] == [2, 2, 4, 4]
    agrees("parameters unfrozen on the way", run)


def test_parameters_that_are_added_later(books: "MakeBooks", agrees: "Agrees") -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    run = books(lambda model: SGD(model[2].parameters(), lr=0.1), model)
    for number in range(4):
        if number == 2:
            run.optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
        model.zero_grad()
        run.train(1)
    assert [len(entry.used) for entry in run.entries] == [2, 2, 4, 4]
    agrees("add_param_group on the way", run)


def test_a_parameter_of_nobody(books: "MakeBooks", agrees: "Agrees") -> None:
    """The optimizer also holds a parameter that is not the model's, such as a temperature."""
    temperature = nn.Parameter(torch.ones(1))
    run = books(lambda model: SGD([*model.parameters(), temperature], lr=0.1))
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.loss() * temperature.exp().sum()
        loss.backward()
        run.step(loss=loss.item())
    assert "group0.4" in run.entries[0].used
    agrees("optimizer with a parameter outside the model", run)


def test_an_attack_on_the_inputs(books: "MakeBooks", agrees: "Agrees") -> None:
    """Adversarial training: the gradients of the first passes are thrown away."""
    run = books()
    for _ in range(3):
        values = torch.randn(BATCH, 6)
        attacked = values.clone().requires_grad_()
        run.loss(values=attacked).backward()
        attacked = (values + 0.1 * attacked.grad.sign()).requires_grad_()  # type: ignore[union-attr]
        (slope,) = torch.autograd.grad(run.loss(values=attacked), attacked)
        run.optimizer.zero_grad()
        loss = run.backward(values=(attacked + 0.1 * slope.sign()).detach())
        run.step(loss=loss)
    agrees("adversarial examples (FGSM, PGD)", run)


def test_a_gradient_penalty(books: "MakeBooks", agrees: "Agrees") -> None:
    """Its forward is trained on, so its samples count; its gradient is no loss."""
    run = books()
    for _ in range(3):
        run.optimizer.zero_grad()
        mixed = torch.randn(BATCH, 6, requires_grad=True)
        (slope,) = torch.autograd.grad(run.loss(values=mixed), mixed, create_graph=True)
        loss = run.loss() + slope.square().sum()
        loss.backward()
        run.step(loss=loss.item(), batch_size=2 * BATCH)
    agrees("gradient penalty", run)


def test_a_discriminator(books: "MakeBooks", agrees: "Agrees") -> None:
    """While the generator trains, the watched discriminator only passes gradients through."""
    generator = nn.Linear(4, 6)
    other = SGD(generator.parameters(), lr=0.1)
    run = books()
    for _ in range(3):
        run.optimizer.zero_grad()
        real = run.loss()
        real.backward()
        fake = run.loss(values=generator(torch.randn(BATCH, 4)).detach())
        fake.backward()
        run.step(loss=real.item() + fake.item(), batch_size=2 * BATCH)
        run.optimizer.zero_grad()
        run.loss(values=generator(torch.randn(BATCH, 4))).backward()
        other.step()
    agrees("one of two models that train each other (GAN)", run)

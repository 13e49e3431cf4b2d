"""The loss evaluated again: the same gradient, and a training that does not notice."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwatch.capture.probe.batch import LastBatch, ObjectiveError, fresh
from gradwatch.capture.probe.limits import limit_of
from gradwatch.capture.probe.objective import LossFunction, Objective, OwnLoss
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.capture.probe.view import ProbeView
from gradwatch.monitors.batch_sharpness import BatchSharpness
from gradwatch.monitors.sharpness import Sharpness
from gradwatch.records import ModelInfo

Batch = dict[str, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.lstm(x.unflatten(1, (3, 2)))[0][:, -1]))


class Careless(nn.Module):
    """Draws from every random stream, counts its calls, and keeps a cache and a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.calls = 0
        self.seen: list[int] = []
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.total += x.detach().sum()
        self.cache = x
        noise = random.random() + float(np.random.rand()) + 0.01 * self.calls
        return cast(Tensor, self.layer(x) * noise + self.total)


def attention() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "n_positions": 8,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
    }
    config = GPT2Config(**sizes, attn_pdrop=0.0)  # only then a fused kernel on the CPU
    return cast(nn.Module, GPT2LMHeadModel(config))


MODELS = [mlp, cnn, Recurrent, Careless, attention, gpt2]


def data(step: int, language: bool) -> Batch:
    generator = torch.Generator().manual_seed(step)
    if language:
        tokens = torch.randint(11, (4, 8), generator=generator)
        return {"input_ids": tokens, "labels": tokens}
    return {
        "x": torch.randn(8, 6, generator=generator),
        "y": torch.randint(3, (8,), generator=generator),
    }


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


class Training:
    """A training whose every step offers three moments to look at it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            cast(Callable[[int], Any], seeded)(0)
        self.model = make()
        self.language = make is gpt2
        self.batches = LastBatch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sharpness = Sharpness(6)
        self.objective: Objective = (
            OwnLoss(self.model, self.batches)
            if self.language
            else LossFunction(self.model, loss_fn, self.batches)
        )

    def loss(self, batch: Batch) -> Tensor:
        if self.language:
            return cast(Tensor, self.model(**batch).loss)
        return loss_fn(self.model, batch)

    def run(self, look: Callable[[], Any] | None = None, moment: str = "") -> list[float]:
        losses = []
        for step in range(3):
            batch = data(step, self.language)
            self.batches.called((), batch)
            self.look(look, moment == "before the forward")
            self.optimizer.zero_grad()
            loss = self.loss(batch)
            losses.append(loss.item())
            loss.backward()
            self.look(look, moment == "after the backward")
            self.optimizer.step()
            self.look(look, moment == "after the step")
            self.batches.release()
        return losses

    @staticmethod
    def look(look: Callable[[], Any] | None, now: bool) -> None:
        if look is not None and now:
            look()

    def probe(self) -> Tensor:
        """Second derivatives, as the monitors of the curvature take them."""
        view = ProbeView(model=ModelInfo(), objective=self.objective, optimizer=self.optimizer)
        with undisturbed(self.model):
            found = self.sharpness.probe(view) | BatchSharpness().probe(view)
        assert found.keys() >= {"sharpness", "rayleigh_quotient"}
        assert ("preconditioned_sharpness" in found) == bool(self.optimizer.state)
        return torch.stack([item.double() for item in found.values()]).abs().sum()


def attributes(model: nn.Module) -> list[Any]:
    return [getattr(model, name, None) for name in ("calls", "seen", "total")]


# --- The training does not notice --------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before the forward", "after the backward", "after the step"])
@pytest.mark.parametrize("make", MODELS)
def test_a_training_with_probes_is_bit_identical(
    make: Callable[[], nn.Module],
    moment: str,
    training_state: Callable[..., dict[str, Any]],
    assert_identical: Callable[..., None],
) -> None:
    plain, probed = Training(make), Training(make)
    seen: list[Tensor] = []
    results = []
    for training, look in ((plain, None), (probed, lambda: seen.append(probed.probe()))):
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            cast(Callable[[int], Any], seeded)(1)
        losses = training.run(look, moment)
        state = training_state(training.model, training.optimizer)
        results.append((losses, state, attributes(training.model)))
    assert_identical(results[0], results[1])
    assert len(seen) == 3
    assert all(item.isfinite() and item > 0 for item in seen)


@pytest.mark.parametrize("make", [cnn, Careless])
def test_an_evaluation_that_raises_restores_everything(
    make: Callable[[], nn.Module],
    training_state: Callable[..., dict[str, Any]],
    assert_identical: Callable[..., None],
) -> None:
    def fails(model: nn.Module, batch: Batch) -> Tensor:
        model.eval()
        loss_fn(model, batch)
        raise ArithmeticError("on purpose")

    training = Training(make)
    training.run()
    objective = LossFunction(training.model, fails, training.batches, data(0, language=False))
    before = training_state(training.model, training.optimizer)
    kept = copy.deepcopy(attributes(training.model))
    grad_mode = torch.is_grad_enabled()
    with pytest.raises(ArithmeticError, match="on purpose"), undisturbed(training.model):
        objective.loss()
    assert_identical(before, training_state(training.model, training.optimizer))
    assert_identical(kept, attributes(training.model))
    assert torch.is_grad_enabled() == grad_mode
    assert torch.backends.cuda.flash_sdp_enabled()


def test_hooks_are_paused_and_hooks_on_parameters_see_nothing() -> None:
    model = mlp()
    events: list[str] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda _: events.append("parameter"))

    @contextmanager
    def pause() -> Iterator[None]:
        events.append("paused")
        yield
        events.append("resumed")

    objective = LossFunction(model, loss_fn, LastBatch(), data(0, language=False))
    with undisturbed(model, pause=pause):
        parameters = objective.parameters()
        torch.autograd.grad(objective.loss(parameters), list(parameters.values()))
    assert events == ["paused", "resumed"]


def test_gradients_are_on_inside_no_grad_and_inference_mode() -> None:
    model = mlp()
    objective = LossFunction(model, loss_fn, LastBatch(), data(0, language=False))
    with torch.no_grad(), undisturbed(model):
        assert objective.loss().requires_grad
    with torch.inference_mode(), undisturbed(model):
        assert objective.loss().requires_grad


def test_a_compiled_model_is_evaluated_uncompiled() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = cast(nn.Module, torch.compile(mlp(), backend=backend))
    batch = data(0, language=False)
    few = {name: item[:5] for name, item in batch.items()}
    outer = nn.Sequential(compiled)
    loss_fn(outer, batch).backward()
    assert len(graphs) == 1
    objective = LossFunction(outer, loss_fn, LastBatch(), few)
    with undisturbed(outer):
        objective.loss()
    loss_fn(outer, batch).backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_is_as_asked(dtype: torch.dtype | None) -> None:
    seen = []

    def noting(model: nn.Module, batch: Batch) -> Tensor:
        output = model(batch["x"])
        seen.append(output.dtype)
        return cast(Tensor, output.float().sum())

    model = mlp()
    objective = LossFunction(model, noting, LastBatch(), data(0, language=False))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        with undisturbed(model, autocast=dtype):
            objective.loss()
        assert torch.is_autocast_enabled("cpu") == (dtype is None)
    assert seen == [dtype or torch.float32]


def test_random_streams_begin_anew_in_each_block_and_run_on_within() -> None:
    torch.manual_seed(0)
    model = cnn()
    objective = LossFunction(model, loss_fn, LastBatch(), data(0, language=False))
    draws = []
    for _ in range(2):
        with undisturbed(model):
            draws.append([objective.loss().item() for _ in range(2)])
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


class Adapted(nn.Module):
    """A frozen base in half precision and what is trained beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).to(torch.bfloat16).requires_grad_(False)
        self.beside = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.base(x) + self.beside(x))


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, model(x).float().square().mean())


@pytest.mark.parametrize(
    ("make", "dtype", "rough"),
    [(mlp, torch.float32, False), (mlp, torch.bfloat16, True), (Adapted, torch.float32, True)],
)
def test_second_derivatives_are_taken_without_autocast_where_all_is_in_float32(
    make: Callable[[], nn.Module], dtype: torch.dtype, rough: bool
) -> None:
    """Elsewhere the types would not fit together, and the training's autocast is kept."""
    seen: list[bool] = []

    def noting(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return squared(model, x)

    model = make()
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    objective = LossFunction(model, noting, LastBatch(), batch)
    view = ProbeView(model=ModelInfo(), objective=objective)
    with undisturbed(model, autocast=torch.bfloat16), view.curvature(objective) as curvature:
        ones = [torch.ones_like(item) for item in view.parameters(objective).values()]
        products = curvature.product(ones)
    assert seen == [rough]
    assert any("rough" in note for note in view.notes) == rough
    assert all(item.isfinite().all() for item in products)


def test_no_finite_differences_of_rough_gradients() -> None:
    objective = LossFunction(Adapted(), squared, LastBatch(), torch.ones(8, 6))
    view = ProbeView(model=ModelInfo(), objective=objective)
    with (
        undisturbed(objective.model, autocast=torch.bfloat16),
        pytest.raises(ObjectiveError, match="autocast"),
        view.curvature(objective, finite_differences=True),
    ):
        pass


class Casting(nn.Module):
    """Relies on autocast: its input is in another type than its parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.bfloat16())
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)


class Stateful(nn.Module):
    """Goes on from the state of the last batch."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, 8, 3)
        lstm = isinstance(self.layer, nn.LSTM)
        return cast(Tensor, self.layer(x.unsqueeze(0), (state, state) if lstm else state)[0])


CASTING = "numbers of two types"
LIMITED = {
    "linear": (Casting(nn.Linear(6, 3)), CASTING),
    "convolution": (Casting(nn.Conv1d(4, 3, 1)), CASTING),
    "convolution without bias": (Casting(nn.Conv1d(4, 3, 1, bias=False)), CASTING),
    "recurrent": (Casting(nn.LSTM(6, 3)), CASTING),
    "attention": (Casting(nn.TransformerEncoderLayer(6, 1, 4)), CASTING),
    "LSTM": (Stateful(nn.LSTM(6, 3)), "state that the last batch left"),
    "GRU": (Stateful(nn.GRU(6, 3)), "state that the last batch left"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_loss_that_cannot_be_probed_is_a_known_limit(name: str) -> None:
    """By the very words of this version of torch."""
    model, expected = LIMITED[name]
    with pytest.raises((RuntimeError, ValueError)) as caught, undisturbed(model):
        LossFunction(model, squared, LastBatch(), torch.ones(4, 6)).loss()
    assert expected in str(limit_of(caught.value))


# --- What is evaluated -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, Recurrent, attention, gpt2])
def test_its_gradient_is_that_of_the_training(make: Callable[[], nn.Module]) -> None:
    training = Training(make)
    if make is not mlp:
        training.model.eval()  # without dropout; LSTM's own dropout too
    batch = data(0, training.language)
    training.batches.called((), batch)
    training.loss(batch).backward()
    with undisturbed(training.model):
        parameters = training.objective.parameters()
        loss = training.objective.loss(parameters)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    torch.testing.assert_close(loss, training.loss(batch))
    for (name, parameter), gradient in zip(
        training.model.named_parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(gradient, parameter.grad, msg=name)


def test_wrappers_are_left_out() -> None:
    model = mlp()
    compiled = cast(nn.Module, torch.compile(model, backend="eager"))
    assert LossFunction(compiled, loss_fn, LastBatch()).model is model


def test_at_other_parameters() -> None:
    model = cast(Any, nn.Linear(1, 1, bias=False))
    objective = LossFunction(
        model, lambda model, batch: model(batch).sum(), LastBatch(), torch.tensor([[2.0]])
    )
    with undisturbed(model):
        assert objective.loss({"weight": torch.tensor([[5.0]])}).item() == 10.0
    assert model.weight.item() != 5.0


def test_halves_of_the_batch_average_to_the_whole() -> None:
    training = Training(mlp)
    training.batches.called((), data(0, language=False))
    with undisturbed(training.model):
        whole = training.objective.loss()
        halves = [training.objective.loss(rows=rows) for rows in (slice(4), slice(4, None))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_halves_of_what_a_language_model_was_called_with() -> None:
    training = Training(gpt2)
    training.model.eval()
    training.batches.called((), data(0, language=True))
    with undisturbed(training.model):
        whole = training.objective.loss()
        halves = [training.objective.loss(rows=rows) for rows in (slice(2), slice(2, None))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_a_tied_parameter_is_one() -> None:
    training = Training(gpt2)
    training.batches.called((), data(0, language=True))
    with undisturbed(training.model):
        parameters = training.objective.parameters()
        assert "lm_head.weight" not in parameters
        training.objective.loss({name: torch.zeros_like(item) for name, item in parameters.items()})
        zero = training.objective.loss(
            {name: torch.zeros_like(item) for name, item in parameters.items()}
        )
    assert zero.item() == pytest.approx(np.log(11), rel=1e-5)


def refuse_sharded() -> str:
    from torch.distributed.fsdp import fully_shard

    model = cast(nn.Module, fully_shard(mlp()))
    try:
        LossFunction(model, loss_fn, LastBatch(), data(0, language=False)).parameters()
    except ObjectiveError as error:
        return str(error)
    return ""


def test_sharded_parameters_are_refused(on_ranks: Callable[..., list[Any]]) -> None:
    assert all("sharded" in said for said in on_ranks(refuse_sharded))


# --- The batch ---------------------------------------------------------------------------------


def test_the_only_argument_is_the_batch() -> None:
    batches = LastBatch()
    x = torch.ones(2, 6)
    batches.called((x,), {})
    assert batches.batch is x
    batches.tell((x, "target"))
    assert batches.batch == (x, "target")


def test_a_batch_that_cannot_be_told() -> None:
    batches = LastBatch()
    with pytest.raises(ObjectiveError, match="no training forward"):
        _ = batches.batch
    batches.called((torch.ones(2), torch.ones(2)), {})
    with pytest.raises(ObjectiveError, match=r"2 positional .* watch.observe"):
        _ = batches.batch


def test_a_released_batch_is_gone() -> None:
    import weakref

    batches = LastBatch()
    x = torch.ones(2)
    gone = weakref.ref(x)
    batches.called((x,), {})
    batches.tell(x)
    del x
    batches.release()
    assert gone() is None
    with pytest.raises(ObjectiveError, match="no training forward"):
        _ = batches.call


def test_a_batch_that_was_changed_in_place() -> None:
    batches = LastBatch()
    x = torch.ones(2)
    batches.called((x,), {})
    x.mul_(2)
    with pytest.raises(ObjectiveError, match="changed in place"):
        _ = batches.batch


def test_rows_of_nested_batches() -> None:
    batch = {"x": [torch.arange(4), "text"], "y": (torch.ones(4, 2), torch.ones(3)), "n": 4}
    cut = fresh(batch, slice(1, 3))
    assert cut["x"][0].tolist() == [1, 2]
    assert [item.shape[0] for item in cut["y"]] == [2, 3]
    assert (cut["x"][1], cut["n"]) == ("text", 4)
    with pytest.raises(ObjectiveError, match="no tensor"):
        fresh({"n": 4}, slice(2))


def test_a_loss_that_is_none() -> None:
    model = mlp()
    each = LossFunction(
        model, lambda model, batch: model(batch["x"]), LastBatch(), data(0, language=False)
    )
    with pytest.raises(ObjectiveError, match=r"scalar tensor, got a Tensor of shape \(8, 3\)"):
        each.loss()
    batches = LastBatch()
    batches.called((data(0, language=False)["x"],), {})
    with pytest.raises(ObjectiveError, match="Sequential has no loss; give a loss_fn"):
        OwnLoss(model, batches).loss()

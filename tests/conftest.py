"""Shared test set-up: deterministic property tests and the record of the verification experiments.

An experiment compares a measured number with theory through the `verify` fixture. With
`--verification PATH` the session writes what was compared as a Markdown table to PATH.
"""

import copy
import inspect
import os
import platform
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import numpy as np
import pytest
import torch

Row = tuple[str, str, str, str, str, str, bool]  # page, experiment, what, three numbers, holds
Tolerance = str | tuple[str, float]

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--verification",
        metavar="PATH",
        type=Path,
        default=None,
        help="write the table of the verification experiments to PATH",
    )
    parser.addoption(
        "--modes",
        metavar="PATH",
        type=Path,
        default=None,
        help="write the matrix of training modes and quantities to PATH",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--verification")
    # A worker of a parallel run reports its rows to the main process, which writes the file.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(VerificationTable(path), "verification-table")


def holds(expected: float, measured: float, tolerance: Tolerance) -> bool:
    """Whether measured agrees with expected.

    ("relative", r): within r times |expected|. ("absolute", a): within a. ("factor", f): both
    positive and neither above f times the other. "at_most": measured is not above expected.
    """
    match tolerance:
        case "at_most":
            return measured <= expected
        case ("relative", size):
            return abs(measured - expected) <= size * abs(expected)
        case ("absolute", size):
            return abs(measured - expected) <= size
        case ("factor", size):
            return 0 < measured <= size * expected and expected <= size * measured
    raise ValueError(
        "tolerance must be 'at_most' or (kind, float) with kind relative, absolute or factor, "
        f"got {tolerance!r}"
    )


def describe(tolerance: Tolerance) -> str:
    match tolerance:
        case ("relative", size):
            return f"{100 * size:.5g} %"
        case ("absolute", size):
            return f"± {size:.5g}"
        case ("factor", size):
            return f"factor {size:.5g}"
    return "at most"


@pytest.fixture
def verify(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a measured number with theory, record the comparison, and fail if it does not hold.

    The title of the page comes from the test module's PAGE.
    """
    page = str(getattr(request.module, "PAGE", request.module.__name__))

    def compare(
        experiment: str, what: str, *, expected: float, measured: float, tolerance: Tolerance
    ) -> None:
        good = holds(float(expected), float(measured), tolerance)
        numbers = (f"{float(expected):.5g}", f"{float(measured):.5g}", describe(tolerance))
        row: Row = (page, experiment, what, *numbers, good)
        request.node.user_properties.append(("verification", row))
        assert good, (
            f"{experiment}, {what}: expected {numbers[0]} ({numbers[2]}), measured {numbers[1]}"
        )

    return compare


class VerificationTable:
    """Collects the rows of all tests, whichever process ran them, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[str, int, Row]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            rows = [row for name, row in report.user_properties if name == "verification"]
            self.rows += [(report.nodeid, i, cast(Row, row)) for i, row in enumerate(rows)]

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        yield "# Verification experiments"
        yield ""
        yield (
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"numpy {np.__version__}."
        )
        title = None
        for _, _, (page, *cells, good) in sorted(self.rows, key=table_order):
            if page != title:
                title = page
                yield from ("", f"## {page}", "")
                yield "| experiment | what | expected | measured | tolerance | holds |"
                yield "|---|---|---|---|---|---|"
            yield f"| {' | '.join([*map(escape, cells), 'yes' if good else '**no**'])} |"


def table_order(entry: tuple[str, int, Row]) -> tuple[Any, ...]:
    """Sort by page and experiment, then by test, then as the test wrote its rows."""
    test, index, row = entry
    return row[0], natural(row[1]), natural(test), index


def natural(text: str) -> list[tuple[int, str]]:
    """Key that puts N2 before N10."""
    pieces = re.findall(r"\d+|\D+", text)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def escape(cell: str) -> str:
    return cell.replace("|", "\\|")


@pytest.fixture
def next_second() -> Callable[[], None]:
    """Wait for the clock: TensorBoard reads event files in the order of the second in their names.

    Two files of one process and one second are in the order of a counter compared as text.
    """

    def wait() -> None:
        now = int(time.time())
        while int(time.time()) == now:
            time.sleep(0.01)

    return wait


# --- Several processes -------------------------------------------------------------------------


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a function in real processes that train together: `on_ranks(function, *arguments)`.

    The function must stand at the top of its test module, which is loaded anew in each process.
    With `joined=True` the processes are in a gloo group when it is called; otherwise they have
    the environment variables to form one. All are killed after `timeout` seconds, and the test
    fails: nothing may hang.

    Returns what the function returned on each rank.
    """
    counter = iter(range(100))

    def run(
        function: Callable[..., Any],
        *arguments: Any,
        world: int = 2,
        joined: bool = True,
        timeout: float = 120,
    ) -> list[Any]:
        folder = tmp_path / f"ranks{next(counter)}"
        folder.mkdir()
        torch.save(arguments, folder / "arguments.pt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(world):
            command = [sys.executable, str(Path(__file__).parent / "rank.py")]
            command += [inspect.getfile(function), function.__name__, str(folder)]
            command += ["joined" if joined else "alone"]
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            with (folder / f"{rank}.log").open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        end = time.monotonic() + timeout
        try:
            codes: list[int | None] = [
                process.wait(max(0.1, end - time.monotonic())) for process in started
            ]
        except subprocess.TimeoutExpired:
            codes = [None] * world
        finally:
            for process in started:
                process.kill()
                process.wait()
        said = "\n".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(world))
        assert codes == [0] * world, f"the ranks ended with {codes} (None: they hang)\n{said}"
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run


# --- What a watch may have touched -------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny operations are faster on one thread, much so where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hooks_on() -> Callable[..., dict[str, list[str]]]:
    """The hooks on a model, on optimizers and in torch itself: `hooks_on(model, *optimizers)`."""
    return collect_hooks


@pytest.fixture
def traces_on() -> Callable[..., dict[str, Any]]:
    """All that a watch could leave behind: `traces_on(model, *optimizers)`.

    Hooks, the names of the attributes of the user's objects, and torch's own functions.
    """
    return collect_traces


@pytest.fixture
def training_state() -> Callable[..., dict[str, Any]]:
    """All that makes up a training, as copies: `training_state(model, *optimizers)`."""
    return collect_training_state


@pytest.fixture
def assert_identical() -> Callable[[Any, Any], None]:
    """Compare two nested structures, tensors bit by bit: `assert_identical(one, other)`."""

    def compare(one: Any, other: Any) -> None:
        different = list(differences(one, other))
        assert not different, "\n".join(different[:10])

    return compare


def collect_hooks(
    model: torch.nn.Module, *optimizers: torch.optim.Optimizer
) -> dict[str, list[str]]:
    owners: dict[str, Any] = {
        **{f"module {name or '(root)'}": item for name, item in model.named_modules()},
        **{f"optimizer {place}": item for place, item in enumerate(optimizers)},
        "every module": torch.nn.modules.module,
        "every optimizer": sys.modules["torch.optim.optimizer"],
    }
    found = {
        f"{owner}.{name}": [repr(hook) for hook in value.values()]
        for owner, item in owners.items()
        for name, value in vars(item).items()
        if "hook" in name and isinstance(value, dict)
    }
    clipping: Any = torch.nn.utils.clip_grad
    for function in (
        torch.autograd.backward,
        clipping._clip_grads_with_norm_,
        clipping._group_tensors_by_device_and_dtype,
    ):
        if function.__module__.startswith("gradwatch"):
            found[f"torch.{function.__name__}"] = [repr(function)]
    for name, parameter in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(parameter, kind) or {}
            found[f"parameter {name}.{kind}"] = [repr(hook) for hook in hooks.values()]
    return {name: hooks for name, hooks in found.items() if hooks}


def collect_traces(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    owners = {
        **{f"module {name}": item for name, item in model.named_modules()},
        **{f"parameter {name}": item for name, item in model.named_parameters()},
        **{f"buffer {name}": item for name, item in model.named_buffers()},
        **{f"optimizer {place}": item for place, item in enumerate(optimizers)},
    }
    return {
        "hooks": collect_hooks(model, *optimizers),
        "attributes": {owner: sorted(vars(item)) for owner, item in owners.items()},
        "classes": {owner: id(type(item)) for owner, item in owners.items()},
        "torch": {
            "backward": id(torch.autograd.backward),
            "Tensor.backward": id(torch.Tensor.backward),
            "clip": id(getattr(torch.nn.utils.clip_grad, "_clip_grads_with_norm_", None)),
            "clip_grad_norm_": id(torch.nn.utils.clip_grad_norm_),
            "call": id(torch.nn.Module.__call__),
            "grad": torch.is_grad_enabled(),
            "dtype": torch.get_default_dtype(),
        },
    }


def collect_training_state(
    model: torch.nn.Module, *optimizers: torch.optim.Optimizer
) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "parameters": {name: item.detach() for name, item in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "gradients": {name: item.grad for name, item in model.named_parameters()},
            "requires_grad": {name: item.requires_grad for name, item in model.named_parameters()},
            "training": {name: item.training for name, item in model.named_modules()},
            "optimizers": [item.state_dict() for item in optimizers],
            "torch random": torch.get_rng_state(),
            "python random": random.getstate(),
            "numpy random": np.random.get_state(),
        }
    )


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if type(one) is not type(other):
        yield f"{where}: {type(one).__name__} is not {type(other).__name__}"
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{where}: the keys {list(one)} are not {list(other)}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {len(one)} items are not {len(other)}"
        for place, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}/{place}")
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        if not same_bits(np.asarray(one), np.asarray(other)):
            yield f"{where}: {one} is not {other}"
    elif repr(one) != repr(other):
        yield f"{where}: {one!r} is not {other!r}"


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and one.tobytes() == other.tobytes()

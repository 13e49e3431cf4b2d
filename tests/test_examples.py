"""The examples run, and are as short as they are said to be."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = EXAMPLES.parent / "docs" / "extend.md"
SCREENSHOT = EXAMPLES.parent / "docs" / "screenshot.py"
LONGEST_EXTENSION = 15
# On a busy machine, threads that wait for one another make small layers many times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def output(name: str, folder: Path, *launcher: str) -> str:
    """What an example prints; Python's options or a launcher come before it."""
    done = subprocess.run(
        [sys.executable, *(launcher or ("-W", "error")), EXAMPLES / name],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert launcher or done.stderr == ""
    return done.stdout


def extensions() -> list[ast.ClassDef]:
    tree = ast.parse((EXAMPLES / "extend.py").read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'output\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_plain_loop(tmp_path: Path) -> None:
    printed = output("plain_loop.py", tmp_path)
    assert "gradwatch at step 100" in printed
    assert "init" in printed
    assert not list(tmp_path.iterdir())


def test_two_processes(tmp_path: Path) -> None:
    printed = output("ddp_digits.py", tmp_path, "-m", "torch.distributed.run", "--nproc-per-node=2")
    assert printed.count("gradwatch at step 100") == 1, "one rank speaks"
    assert "batch_size            64" in printed
    assert "init" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(tmp_path: Path) -> None:
    printed = output("lightning_digits.py", tmp_path, "-W", "default")  # Lightning's own warnings
    assert "gradwatch at step" in printed
    assert "gradient_norm " in printed
    assert "loss " in printed


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers(tmp_path: Path) -> None:
    printed = output("transformers_text.py", tmp_path)
    assert "gradwatch at step 90" in printed
    assert "gradient_norm " in printed
    assert "loss " in printed
    assert not list(tmp_path.iterdir())


def test_plan_network(tmp_path: Path) -> None:
    printed = output("plan_network.py", tmp_path)
    assert "candidate" in printed
    assert "Constants are those at initialisation" in printed
    assert not list(tmp_path.iterdir())


def test_hessian_spectrum(tmp_path: Path) -> None:
    printed = output("hessian_spectrum.py", tmp_path)
    assert printed.count("spectrum of the Hessian") == 2
    assert len(re.findall(r"largest eigenvalue +[0-9.]+ ± ", printed)) == 2
    assert not list(tmp_path.iterdir())


def test_advice_against_noise_is_worth_following(tmp_path: Path) -> None:
    printed = output("noise_or_steps.py", tmp_path)
    assert "the watch: learning_rate 1 -> " in printed
    assert "more steps cannot bring" in " ".join(printed.split())
    unchanged, advised = re.findall(r"steps more at .*= ([0-9.]+)", printed)
    assert float(advised) < float(unchanged) / 4, "a quarter is what the advice aims at"
    assert not list(tmp_path.iterdir())


def test_the_edge_of_stability_is_healthy_and_beyond_it_advice_helps(tmp_path: Path) -> None:
    printed = output("edge_of_stability.py", tmp_path)
    edge, beyond, advised = printed.split("\n\n")
    for healthy in (edge, advised):
        losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", healthy)]
        assert losses[-1] < losses[0] / 10
        ratios = [float(ratio) for ratio in re.findall(r"stability ratio ([0-9.]+)", healthy)]
        assert ratios[-1] == pytest.approx(1, abs=0.1)
    assert int(re.findall(r"break-even at step (\d+)", edge)[0]) > 0
    assert int(re.findall(r"rose from one report to the next (\d+) times", edge)[0]) > 5
    assert "advice in 0 reports" in edge
    (proposed,) = re.findall(r"warning: learning_rate 2 -> ([0-9.]+)", beyond)
    assert 0.1 < float(proposed) < 2 / 8.24, "below what is stable at the sharpness of the start"
    assert "stability threshold" in " ".join(beyond.split())
    assert not list(tmp_path.iterdir())


def test_extend(tmp_path: Path) -> None:
    printed = output("extend.py", tmp_path)
    assert "gradient_spread" in printed
    assert "halves_cosine" in printed
    assert "EvenGradients" in printed
    assert "depth_skip" in printed
    assert "step 150: depth_skip" in printed
    assert "is off" not in printed


def test_each_extension_point_is_shown_and_a_monitor_that_probes() -> None:
    bases = [base.id for node in extensions() for base in node.bases if isinstance(base, ast.Name)]
    assert sorted(bases) == ["Bound", "Monitor", "Monitor", "Rule", "Sink"]


@pytest.mark.parametrize("node", extensions(), ids=lambda node: node.name)
def test_an_extension_is_at_most_15_lines(node: ast.ClassDef) -> None:
    assert node.end_lineno is not None
    assert node.end_lineno - node.lineno + 1 <= LONGEST_EXTENSION


def test_the_page_shows_the_example_of_a_probe_as_it_is() -> None:
    whole = (EXAMPLES / "extend.py").read_text(encoding="utf-8")
    probing = next(node for node in extensions() if "probed" in ast.unparse(node))
    shown = re.findall(r"```python\n(class .*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown == [ast.get_source_segment(whole, probing)]


def test_the_picture_of_the_page_says_which_browser_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCREENSHOT],
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, "PATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("no browser: install one of chromium")

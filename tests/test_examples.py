"""The examples run, and are as short as they are said to be."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCREENSHOT = EXAMPLES.parent / "docs" / "screenshot.py"
LONGEST_EXTENSION = 15
# On a busy machine, threads that wait for one another make small layers many times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def output(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def extensions() -> list[ast.ClassDef]:
    tree = ast.parse((EXAMPLES / "extend.py").read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"extend.py", "plain_loop.py"}


def test_plain_loop(tmp_path: Path) -> None:
    printed = output("plain_loop.py", tmp_path)
    assert "gradwatch at step 100" in printed
    assert "init" in printed
    assert not list(tmp_path.iterdir())


def test_extend(tmp_path: Path) -> None:
    printed = output("extend.py", tmp_path)
    assert "gradient_spread" in printed
    assert "EvenGradients" in printed
    assert "depth_skip" in printed
    assert "step 150: depth_skip" in printed
    assert "is off" not in printed


def test_each_extension_point_is_shown_once() -> None:
    bases = [base.id for node in extensions() for base in node.bases if isinstance(base, ast.Name)]
    assert sorted(bases) == ["Bound", "Monitor", "Rule", "Sink"]


@pytest.mark.parametrize("node", extensions(), ids=lambda node: node.name)
def test_an_extension_is_at_most_15_lines(node: ast.ClassDef) -> None:
    assert node.end_lineno is not None
    assert node.end_lineno - node.lineno + 1 <= LONGEST_EXTENSION


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

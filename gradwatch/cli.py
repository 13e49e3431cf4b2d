"""The `gradwatch` command."""

import argparse
import io
import sys
from collections.abc import Sequence

from gradwatch.adapters import load_adapter
from gradwatch.arguments import installed_versions
from gradwatch.errors import GradwatchError

FAILED = 2
INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None takes those of the process.

    Returns:
        The exit status: 0, 2 for an error that is explained on standard error, 130 after Ctrl-C.
    """
    # A terminal that cannot show "²" must not end the command with a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    options = _parser().parse_args(argv)
    try:
        _demo(options)
    except GradwatchError as error:
        print(f"gradwatch: {error}", file=sys.stderr)  # noqa: T201 - a command prints
        return FAILED
    except KeyboardInterrupt:
        print("gradwatch: stopped by Ctrl-C", file=sys.stderr)  # noqa: T201 - as above
        return INTERRUPTED
    return 0


def _demo(options: argparse.Namespace) -> None:
    demo = load_adapter("gradwatch_demo", feature="gradwatch demo", extra="demo")
    demo.run_demo(
        steps=options.steps, seed=options.seed, logdir=options.logdir, device=options.device
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradwatch",
        description="Watches a PyTorch training, compares it with theory and explains its advice.",
    )
    version = f"gradwatch {installed_versions()['gradwatch']}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits, watched; then once more with the advice followed",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=int, default=600, help="optimizer steps of each training")
    demo.add_argument("--seed", type=int, default=0, help="of the initialisation and data order")
    demo.add_argument("--logdir", default="runs/demo", help="folder for the records of both runs")
    demo.add_argument("--device", default="cpu", help="where to train, as torch names it")
    return parser

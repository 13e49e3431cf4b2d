"""What the demo says at its end, worked out from the numbers."""

import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gradwatch import Report
from gradwatch.table import number
from gradwatch_demo.training import Outcome

SIGNIFICANCE = 2.0
"""Standard errors that the two accuracies must differ by."""
NOISE_TERMS = {"RandomlyStoppedSgd": "noise_term", "NoiseFloor": "floor"}
"""The bounds of the whole run and of its newest part, and what is the noise in each."""
NOISE_LIMITED, STEP_LIMITED = 0.7, 0.3
"""Share of the noise in the bound from which, and up to which, one of the two is what limits."""


PLURAL = {"holds": "hold", "violated": "violated", "vacuous": "vacuous", "undecided": "undecided"}


def followed(factors: Mapping[str, float]) -> str:
    """What was done to the weights.

    Args:
        factors: of each layer.

    Returns:
        Half a sentence.

    Example:
        >>> followed({"hidden1": 2.44, "hidden2": 2.44})
        'with the advice followed: the weights of hidden1, hidden2 multiplied by 2.44'
    """
    layers: dict[str, list[str]] = {}
    for name, factor in factors.items():
        layers.setdefault(f"{factor:.3g}", []).append(name)
    done = [f"the weights of {_listed(names)} multiplied by {by}" for by, names in layers.items()]
    return "with the advice followed: " + (", ".join(done) or "nothing to change")


def comparison(first: Outcome, second: Outcome, *, images: int) -> str:
    """Both results side by side, and what follows from them.

    Args:
        first: of the training as it was.
        second: of the training with the advice followed.
        images: on how many the accuracies were measured.

    Returns:
        Several lines, without a newline at the end.
    """
    rows = [
        f"  {name:<8}  {outcome.accuracy:>13.1%}  {_found(outcome.summary)}"
        for name, outcome in (("as is", first), ("advised", second))
    ]
    header = f"  {'run':<8}  {'test accuracy':>13}  verdicts; recommendations"
    sentence = verdict(first.accuracy, second.accuracy, images=images)
    said = [sentence, limited_by(second.summary), edge(second.summary)]
    return "\n".join([header, *rows, "", *filter(None, said)])


def limited_by(report: Report) -> str:
    """Whether gradient noise or the number of steps limits the second training, and what to do.

    Args:
        report: its summary.

    Returns:
        One sentence.

    Example:
        >>> limited_by(Report(step=0))
        'Whether steps or noise limit the second run cannot be told: its noise was not measured.'
    """
    by_bound = {item.bound: item for item in report.verdicts}
    judged = [by_bound[name] for name in NOISE_TERMS if name in by_bound]
    found = next((item for item in judged if item.status == "holds"), None)
    if found is None:
        # The bound on the newest part has the newest reasons.
        because = judged[-1].because if judged else "its noise was not measured"
        because = because or "the bound is violated, so that an assumption of it is not met"
        return f"Whether steps or noise limit the second run cannot be told: {because}."
    share = found.measurement.inputs[NOISE_TERMS[found.bound]] / found.interval.upper
    numbers = (
        f"its mean squared gradient is {number(found.measurement.value)}, the bound on it "
        f"{number(found.interval.upper)}, {share:.0%} of which is gradient noise"
    )
    if share >= NOISE_LIMITED:
        what = "Noise limits"
        remedy = (
            "a smaller learning rate or a larger batch would bring it down, more steps would not"
        )
    elif share <= STEP_LIMITED:
        what = "The number of steps limits"
        remedy = (
            "more steps or a larger learning rate would bring it down, a larger batch would not"
        )
    else:
        what = "Both steps and noise limit"
        remedy = "more steps would bring it down for a while, less noise later"
    return f"{what} the second run: {numbers}; {remedy}."


def edge(report: Report) -> str:
    """How close the second training came to its edge of stability.

    Args:
        report: its summary.

    Returns:
        One sentence; "" if its sharpness was not measured.

    Example:
        >>> edge(Report(step=0))
        ''
    """
    newest = {item.metric: item for item in report.measurements}
    ratio, reached = newest.get("stability_ratio"), newest.get("break_even_step")
    if ratio is None:
        return ""
    when = "it was not seen at the edge of stability"
    if reached is not None:
        when = f"it came to the edge of stability at step {reached.value:.0f}: {reached.source}"
    return f"Its sharpness is {ratio.value:.2g} of what its steps can stand; {when}."


def verdict(before: float, after: float, *, images: int) -> str:
    """Whether the advice helped, in one sentence.

    Args:
        before: test accuracy without it.
        after: test accuracy with it.
        images: on how many both were measured.

    Returns:
        The sentence.

    Example:
        >>> verdict(0.5, 0.51, images=100)
        'Following the advice made no difference that 100 test images could show.'
    """
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / images)
    change = f"from {before:.1%} to {after:.1%} of {images} images; nothing else differed."
    if after - before > SIGNIFICANCE * error:
        return f"Following the advice raised the test accuracy {change}"
    if before - after > SIGNIFICANCE * error:
        return f"Following the advice did not help, it lowered the test accuracy {change}"
    return f"Following the advice made no difference that {images} test images could show."


def command(folder: Path) -> str:
    """The command that opens the TensorBoard page of the runs in a folder.

    In an environment that is not activated it is the one beside this Python.
    """
    beside = Path(sys.executable).with_name("tensorboard")
    here = Path.cwd()
    program = "tensorboard"
    if shutil.which(program) is None and beside.exists():
        program = str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
    return shlex.join([program, "--logdir", str(folder)])


def _found(report: Report) -> str:
    counts = Counter(item.status for item in report.verdicts)
    verdicts = ", ".join(f"{count} {PLURAL[status]}" for status, count in sorted(counts.items()))
    knobs = [f"{item.knob} ({item.severity})" for item in report.recommendations]
    return f"{verdicts or 'none'}; {', '.join(knobs) or 'none'}"


def _listed(names: list[str]) -> str:
    few = 3
    return ", ".join(names) if len(names) <= few else f"{names[0]} to {names[-1]}"

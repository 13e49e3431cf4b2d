"""The command: what it prints, what it leaves behind, how it refuses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradwatch
import gradwatch_demo
from gradwatch.arguments import installed_versions
from gradwatch.cli import main
from gradwatch_demo.conclusion import edge, limited_by, verdict
from gradwatch_demo.model import deep_classifier, follow_advice

RUNS = ("as_is", "advised")


def demo(*arguments: str, logdir: Path) -> int:
    return main(["demo", "--steps", "30", "--logdir", str(logdir), *arguments])


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one short demo, run as a user runs it."""
    logdir = tmp_path_factory.mktemp("demo")
    command = f"import sys; from gradwatch.cli import main; sys.exit(main({_short(logdir)!r}))"
    done = python(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return logdir, done.stdout


def _short(logdir: Path) -> list[str]:
    return ["demo", "--steps", "30", "--logdir", str(logdir)]


@pytest.mark.parametrize("name", RUNS)
def test_both_runs_are_recorded(finished: tuple[Path, str], name: str) -> None:
    run = gradwatch.read(finished[0] / name)
    assert [step for step, _ in run.values("loss")] == list(range(0, 30, 2))
    assert run.header.model.depth == 11
    assert list((finished[0] / name).glob("*tfevents*"))


def test_the_advice_names_the_initialisation_and_following_it_silences_it(
    finished: tuple[Path, str],
) -> None:
    as_is, advised = (gradwatch.read(finished[0] / name).reports[-1] for name in RUNS)
    assert [item.knob for item in as_is.recommendations] == ["init"]
    assert not advised.recommendations
    assert re.search(r"warning +init +hidden1 to hidden10", finished[1])
    assert "the weights of hidden1 to hidden10 multiplied by 2.4" in finished[1]


def test_accuracies_stand_side_by_side_with_the_command_that_shows_more(
    finished: tuple[Path, str],
) -> None:
    logdir, printed = finished
    assert re.search(r"as is +\d+\.\d% ", printed)
    assert re.search(r"advised +\d+\.\d% ", printed)
    assert "\nFollowing the advice " in printed
    assert f"tensorboard --logdir {logdir}\n" in printed


def test_a_second_demo_in_the_same_folder_repeats_the_first(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    for _ in range(2):
        assert demo(logdir=tmp_path) == 0
    for name in RUNS:
        first, second = gradwatch.read(finished[0] / name), gradwatch.read(tmp_path / name)
        assert first.values("loss") == second.values("loss")
        assert first.values("gradient_norm") == second.values("gradient_norm")


def test_the_number_of_threads_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    accuracies = gradwatch_demo.run_demo(steps=1, logdir=tmp_path)
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["steps", "at least 1", "got 0"]),
        (["--seed", "-1"], ["seed", "got -1"]),
        (["--device", "quux"], ["device", "got 'quux'", "give cpu"]),
        (["--device", "meta"], ["device", "got 'meta'", "give cpu"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logdir = tmp_path / "new"
    assert demo(*arguments, logdir=logdir) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gradwatch: ")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words)
    assert not logdir.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--device", "cuda", logdir=tmp_path) == 2
    assert "got 'cuda'; give cpu" in capsys.readouterr().err


@pytest.mark.parametrize("blocked", RUNS)
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    blocked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / blocked).write_text("a file where a folder should be")
    assert demo(logdir=tmp_path) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.match(r"gradwatch: .*give a logdir that can be written\n", said.err)


@pytest.mark.parametrize("package", ["sklearn", "tqdm", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(package: str, tmp_path: Path) -> None:
    done = python(
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from gradwatch.cli import main; sys.exit(main({_short(tmp_path)!r}))"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gradwatch: gradwatch demo needs a package")
    assert package in done.stderr
    assert done.stderr.endswith('pip install "torch-gradwatch[demo]"\n')


def test_ctrl_c_closes_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward, loss = torch.autograd.backward, torch.nn.functional.cross_entropy
    calls = iter(range(32))  # the next one is in the middle of a probe of step 4

    def interrupted(logits: Tensor, labels: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(logits, labels)

    monkeypatch.setattr("gradwatch_demo.training.functional.cross_entropy", interrupted)
    assert demo(logdir=tmp_path) == 130
    assert capsys.readouterr().err == "gradwatch: stopped by Ctrl-C\n"
    assert [step for step, _ in gradwatch.read(tmp_path / "as_is").values("loss")] == [0, 2]
    assert torch.autograd.backward is backward


@pytest.mark.parametrize(
    ("step_term", "noise_term", "undecided", "words"),
    [
        (
            0.1,
            0.9,
            "",
            "Noise limits the second run: its mean squared gradient is 0.5, the",
        ),
        (0.9, 0.1, "", "The number of steps limits the second run: "),
        (0.5, 0.5, "", "Both steps and noise limit the second run: "),
        (0.1, 0.9, "the optimizer is Adam", "second run cannot be told: the optimizer is Adam."),
        (0.0, 0.1, "", "cannot be told: the bound is violated"),
    ],
)
def test_one_sentence_says_what_limits_the_training(
    step_term: float, noise_term: float, undecided: str, words: str
) -> None:
    measured = gradwatch.Measurement(
        metric="stationarity",
        scope="model",
        step=9,
        value=0.5,
        inputs={"step_term": step_term, "noise_term": noise_term},
    )
    interval = gradwatch.Interval(upper=step_term + noise_term, undecided=undecided)
    found = gradwatch.Verdict.of(measured, interval, bound="RandomlyStoppedSgd", source="here")
    assert words in limited_by(gradwatch.Report(step=9, verdicts=(found,)))


def test_one_sentence_says_how_close_the_edge_of_stability_came() -> None:
    ratio = gradwatch.Measurement(metric="stability_ratio", scope="model", step=9, value=0.36)
    reached = gradwatch.Measurement(
        metric="break_even_step", scope="model", step=9, value=7.0, source="by noise"
    )
    far, near = ((ratio,), (ratio, reached))
    said = [edge(gradwatch.Report(step=9, measurements=found)) for found in ((), far, near)]
    assert said[0] == ""
    assert said[1].endswith(
        "0.36 of what its steps can stand; it was not seen at the edge of stability."
    )
    assert said[2].endswith("it came to the edge of stability at step 7: by noise.")


def test_the_newest_bound_says_why_it_cannot_be_told() -> None:
    step = gradwatch.Measurement(metric="stationarity", scope="model", step=9, value=0.5)
    found = [
        gradwatch.Verdict.of(step, gradwatch.Interval(undecided=why), bound=bound, source="here")
        for bound, why in (("RandomlyStoppedSgd", "too few"), ("NoiseFloor", "beyond 2/L"))
    ]
    assert limited_by(gradwatch.Report(step=9, verdicts=tuple(found))).endswith(": beyond 2/L.")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.1, 0.95, "raised the test accuracy from 10.0% to 95.0% of 360 images"),
        (0.95, 0.9, "did not help, it lowered the test accuracy from 95.0% to 90.0%"),
        (0.95, 0.96, "made no difference that 360 test images could show"),
        (1.0, 1.0, "made no difference"),
    ],
)
def test_the_last_sentence_follows_from_the_numbers(
    before: float, after: float, words: str
) -> None:
    assert words in verdict(before, after, images=360)


def test_advice_on_a_whole_chain_is_followed_in_each_of_its_layers() -> None:
    names = [f"hidden{index}" for index in range(1, 11)]
    advice = gradwatch.Recommendation(
        knob="init", reason="R", current=1.0, proposed=1.5, targets=tuple(names)
    )
    other = gradwatch.Recommendation(knob="width", reason="R", current=8, proposed=16)
    torch.manual_seed(0)
    model = deep_classifier()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert follow_advice(model, [advice, other]) == dict.fromkeys(names, 1.5)
    for name, now in model.named_parameters():
        layer, _, kind = name.partition(".")
        factor = 1.5 if layer in names and kind == "weight" else 1.0
        assert torch.equal(now, before[name] * factor)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gradwatch {installed_versions()['gradwatch']}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--steps", "many"]])
def test_a_wrong_command_line_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: gradwatch")

"""Which metrics and scopes are reported."""

import pytest

from gradwatch.capture.model.names import canonical
from gradwatch.capture.selection import Selection
from gradwatch.errors import ConfigError

METRICS = ["gradient_norm", "gradient_norm_used", "activation_norm", "loss"]


def kept(include: list[str] | None, exclude: list[str] | None) -> set[tuple[str, str]]:
    selection = Selection(include, exclude, METRICS)
    scopes = ("model", "encoder.0.weight", "head.bias")
    return {(m, s) for m in METRICS for s in scopes if selection.keeps(m, s)}


def test_everything_by_default() -> None:
    assert len(kept(None, None)) == 12


def test_a_metric_is_not_mistaken_for_a_longer_one() -> None:
    assert {metric for metric, _ in kept(["gradient_norm"], None)} == {"gradient_norm"}


def test_a_scope_pattern() -> None:
    assert kept(["*/encoder.*"], None) == {(metric, "encoder.0.weight") for metric in METRICS}


def test_exclude_wins() -> None:
    assert kept(["gradient_norm*"], ["*_used", "gradient_norm/head.*"]) == {
        ("gradient_norm", "model"),
        ("gradient_norm", "encoder.0.weight"),
    }


def test_a_monitor_none_of_whose_values_is_wanted_can_be_left_out() -> None:
    selection = Selection(None, ["loss", "activation_norm/encoder.*"], METRICS)
    assert not selection.keeps_some_of("loss")
    assert selection.keeps_some_of("activation_norm")


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_names_no_metric(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument} has 'encoder.*', which names no metric"):
        Selection(**{"include": None, "exclude": None, argument: ["encoder.*"]}, metrics=METRICS)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_orig_mod.layer.weight", "layer.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
        ("encoder._checkpoint_wrapped_module", "encoder"),
        ("plain.weight", "plain.weight"),
    ],
)
def test_wrappers_leave_no_trace_in_names(wrapped: str, plain: str) -> None:
    assert canonical(wrapped) == plain

"""What is set for the callback, and what it finds out itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import gradwatch
from gradwatch.errors import ConfigError, RecordError
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

SIZE = 4  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every_n_steps": 7, "log_every_n_steps": 50}, "multiple"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"monitors": [gradwatch.Monitor]}, "monitors"),
        ({"sinks": [print]}, "sinks"),
        ({"rules": 3}, "rules"),
        ({"include": ["no_such_metric"]}, "no_such_metric"),
        ({"train_size": 0}, "train_size"),
        ({"planned_steps": -1}, "planned_steps"),
        ({"per_layer": "yes"}, "per_layer"),
        ({"per_layer": 1}, "per_layer"),
        ({"tag_prefix": ""}, "tag_prefix"),
        ({"tag_prefix": None}, "tag_prefix"),
        ({"sinks": None}, "sinks"),
        ({"logdir": 5}, "logdir"),
        ({"logdir": ""}, "logdir"),
        ({"on_recommendation": "shout"}, "on_recommendation"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_a_wrong_option_raises_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GradwatchCallback(**options)


def test_a_folder_that_cannot_be_one_raises_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError):
        GradwatchCallback(tmp_path / "file")


def test_making_one_draws_no_random_numbers(assert_identical: Any) -> None:
    before = torch.get_rng_state()
    GradwatchCallback()
    assert_identical(torch.get_rng_state(), before)


def test_what_the_user_says_of_the_training_counts(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    callback = GradwatchCallback(sinks=[told], train_size=7, planned_steps=9, **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    assert told.run is not None
    assert (told.run.model.train_size, told.run.model.planned_steps) == (7, 9)


def test_an_endless_training_over_a_stream_has_no_size(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            dataset: Any = data().dataset
            return iter(dataset)

    def stop(self: Any, *args: Any) -> None:
        self.trainer.should_stop = self.trainer.global_step >= 3

    callback = GradwatchCallback(sinks=[told], **EVERY)
    loader = DataLoader(Stream(), batch_size=SIZE)
    model = module(pl, on_train_batch_end=stop)
    trainer(pl, callback, max_epochs=-1).fit(model, loader)
    assert told.run is not None
    assert (told.run.model.train_size, told.run.model.planned_steps) == (None, None)
    assert len(told.reports) == 3


def test_before_any_fit_there_is_an_empty_summary() -> None:
    callback = GradwatchCallback()
    assert callback.watch is None
    assert callback.recommendations == ()
    assert callback.summary().notes == ("nothing has been measured yet",)
    assert callback.state_dict() == {}

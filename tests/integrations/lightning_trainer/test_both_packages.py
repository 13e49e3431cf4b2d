"""The callback in real Trainers of both packages."""

import subprocess
import sys
from typing import Any

import pytest

import gradwatch
from gradwatch.errors import MissingExtraError
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

BATCHES, SIZE = 6, 4  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_it_watches_in_the_trainer_of_either_package(
    package: str, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any, values: Any
) -> None:
    pl = pytest.importorskip(package)
    callback = GradwatchCallback(sinks=[told], **EVERY)
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, GradwatchCallback)
    model = module(pl)
    trainer(pl, callback, max_epochs=2, gradient_clip_val=0.1).fit(model, data(), data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert max(values(told, "gradient_norm_used").values()) == pytest.approx(0.1, rel=1e-4)
    assert min(values(told, "gradient_norm").values()) > 0.1
    report = told.reports[-1]
    assert report.info.batch_size == SIZE
    assert report.info.epoch == 1
    assert report.value("activation_norm", "net.0") is not None
    assert report.notes == ()
    assert told.run is not None
    assert told.run.model.train_size == BATCHES * SIZE
    assert told.run.model.planned_steps == 2 * BATCHES


def test_importing_it_imports_no_lightning() -> None:
    code = (
        "import gradwatch, gradwatch_lightning, sys; "
        "assert not [name for name in sys.modules if 'lightning' in name.split('.')[0] "
        "and not name.startswith('gradwatch')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "torch-gradwatch\[lightning\]"'):
        GradwatchCallback()

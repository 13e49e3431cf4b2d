"""All loggers of a Trainer get the same."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

BATCHES = 6  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_loggers_get_the_same(
    pl: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    per_layer: bool,
    board_points: Any,
    csv_rows: Any,
    csv_values: Any,
    data: Any,
    module: Any,
    trainer: Any,
    always: Any,
) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    loggers = [
        pl.loggers.TensorBoardLogger(tmp_path),
        pl.loggers.CSVLogger(tmp_path),
        pl.loggers.WandbLogger(save_dir=tmp_path, offline=True),
        pl.loggers.MLFlowLogger(tracking_uri=address, artifact_location=str(tmp_path / "art")),
    ]
    board, table, bees, flow = loggers
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(bees.experiment, "log", lambda row, *args, **kwargs: sent.append(row))
    callback = GradwatchCallback(rules=[always], per_layer=per_layer, **EVERY)
    trainer(pl, callback, logger=loggers).fit(module(pl), data())
    bees.experiment.finish()

    points = board_points(board)
    assert ("gradwatch_gradient_norm_used/net.0.weight" in points) is per_layer
    assert [step for step, _ in points["gradwatch/loss"]] == list(range(BATCHES))
    for tag, curve in points.items():
        in_single = dict(curve)
        assert csv_values(table, tag) == pytest.approx(in_single), tag
        rows = {row["trainer/global_step"]: row[tag] for row in sent if tag in row}
        assert all(type(value) is float for value in rows.values())
        assert rows == pytest.approx(in_single), tag
        client = mlflow.MlflowClient(address)
        history = client.get_metric_history(flow.run_id, tag)
        assert {item.step: item.value for item in history} == pytest.approx(in_single), tag
    assert {tag for row in csv_rows(table) for tag in row if tag.startswith("gradwatch")} == set(
        points
    )
    assert len([row for row in sent if "gradwatch/recommendations" in row]) == 1
    files = [item.path for item in client.list_artifacts(flow.run_id, "gradwatch")]
    assert files == ["gradwatch/recommendations.md"]


def test_tensorboard_gets_the_whole_page(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = pl.loggers.TensorBoardLogger(tmp_path)
    callback = GradwatchCallback(tmp_path / "record", **EVERY)
    trainer(pl, callback, logger=logs).fit(module(pl), data())
    events = board.EventAccumulator(logs.log_dir)
    events.Reload()
    assert "gradwatch/recommendations/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "gradwatch_activation_norm/net.0" in events.Tags()["scalars"]
    assert "train_loss" in events.Tags()["scalars"]
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["gradwatch.jsonl"]


def test_a_logdir_has_the_page_where_no_logger_draws_it(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    pytest.importorskip("tensorboard")
    trainer(pl, GradwatchCallback(tmp_path, **EVERY)).fit(module(pl), data())
    assert len(list(tmp_path.glob("*tfevents*"))) == 1
    assert (tmp_path / "gradwatch.jsonl").exists()


def test_without_a_logger_for_text_advice_goes_to_the_log_once(
    pl: Any, caplog: pytest.LogCaptureFixture, data: Any, module: Any, trainer: Any, always: Any
) -> None:
    caplog.set_level(logging.INFO, logger="gradwatch")
    callback = GradwatchCallback(rules=[always], **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    said = [record for record in caplog.records if record.name == "gradwatch"]
    assert [(record.levelname, record.getMessage()) for record in said] == [
        ("WARNING", "advice: clip of model: fix. too large"),
        ("INFO", "info: width of model: fix. too narrow"),
    ]
    assert [item.knob for item in callback.recommendations] == ["clip", "width"]


def test_a_logger_that_fails_stands_alone(
    pl: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    csv_values: Any,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    class Broken(pl.loggers.CSVLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("gradwatch") for name in metrics):
                raise OSError("disk full")

    good = pl.loggers.CSVLogger(tmp_path, name="good")
    callback = GradwatchCallback(every_n_steps=1, log_every_n_steps=1)
    trainer(pl, callback, logger=[Broken(tmp_path, name="broken"), good]).fit(module(pl), data())
    assert caplog.text.count("disk full") == 1
    assert sorted(csv_values(good)) == list(range(BATCHES))


def test_with_two_optimizers_the_axis_is_that_of_lightning(
    pl: Any, tmp_path: Path, csv_rows: Any, data: Any, module: Any, trainer: Any
) -> None:
    """`global_step` counts both; Lightning draws at the batch."""

    def two(self: Any) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    def training_step(self: Any, batch: Any, index: int) -> None:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("train_loss", loss)
        self.manual_backward(loss)
        for _ in range(2):  # two rounds a batch
            for optimizer in self.optimizers():
                optimizer.step()

    logs = pl.loggers.CSVLogger(tmp_path)
    model = module(pl, manual=True, training_step=training_step, configure_optimizers=two)
    callback = GradwatchCallback(every_n_steps=2, log_every_n_steps=4, on_error="raise")
    boss = trainer(pl, callback, logger=logs)
    boss.fit(model, data())
    assert boss.global_step == 4 * BATCHES
    rows = csv_rows(logs)
    for tag in ("gradwatch/update_norm", "train_loss"):
        drawn = [int(row["step"]) for row in rows if row.get(tag)]
        assert drawn == list(range(BATCHES)), tag

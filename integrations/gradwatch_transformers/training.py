"""One call of `trainer.train()`, watched from its beginning to its end."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.training_args import ParallelMode, TrainingArguments

import gradwatch
from gradwatch import Sink, presets
from gradwatch.capture.model.names import unwrap_model
from gradwatch.isolation import logger
from gradwatch.options import Options
from gradwatch_transformers.engine import EngineOptimizer, is_deepspeed, visible
from gradwatch_transformers.loss import BackwardLoss, OutputLoss, StepLoss
from gradwatch_transformers.objective import ReturnedLoss
from gradwatch_transformers.token_weights import TokenWeights
from gradwatch_transformers.values import NewestValues

STATE_VERSION: Final = 1
"""Of what `Training.state_dict` returns."""


class Training:
    """A watch and what it needs to be told about the Trainer's steps.

    Args:
        options: of the user.
        arguments: of the Trainer.
        model: as the training calls it, or inside its wrappers.
        optimizer: accelerate's.
        facts: `train_size` and `planned_steps` as the Trainer knows them.

    Attributes:
        watch: the watch.
        values: what the reports say, for the loggers.
    """

    def __init__(
        self,
        options: Options,
        arguments: TrainingArguments,
        model: nn.Module,
        optimizer: Any,
        facts: Mapping[str, int | None],
    ) -> None:
        self.values = NewestValues(options.tag_prefix, per_layer=bool(options.per_layer))
        settings = options.for_watch()
        settings |= {name: value for name, value in facts.items() if settings[name] is None}
        sinks: list[Sink] = [self.values, *options.sinks]
        distributed = arguments.parallel_mode == ParallelMode.DISTRIBUTED
        if distributed and arguments.world_size > 1:
            settings["distributed"] = True
        self._engine = EngineOptimizer(model, optimizer) if is_deepspeed(optimizer) else None
        if self._engine is not None:
            monitors = options.monitors
            settings["monitors"] = visible(presets.standard() if monitors is None else monitors)
        self.watch = gradwatch.watch(
            model,
            self._engine or optimizer,
            **(settings | {"sinks": sinks}),
            objective=partial(ReturnedLoss, unwrap_model(model)),
            track_clipping=self._engine is None and not isinstance(model, FullyShardedDataParallel),
        )
        self._loss = self._loss_source(arguments, model)
        self._weights = TokenWeights(model, self.watch) if self._engine is None else None

    def step_begins(self, epoch: float | None) -> None:
        """The first micro-batch of an optimizer step is next.

        Args:
            epoch: epochs finished.
        """
        self._loss.reset()
        if self._engine is not None:
            self._engine.read_lr()
        self._tell(epoch=epoch)

    def about_to_step(self) -> None:
        """All micro-batches have gone backward."""
        if self.watch.sampling:
            self._tell(loss=self._loss.total())

    def stepped(self) -> None:
        """The optimizer has stepped; an engine has done so out of sight."""
        if self._engine is not None:
            self._engine.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run continues; plain values only."""
        state = {
            "version": STATE_VERSION,
            "watch": self.watch.state_dict(),  # reports what is pending, and so comes first
            "values": self.values.state_dict(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(state, sort_keys=True))
        return plain

    def resume(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Continues an earlier run.

        Args:
            state: what `state_dict` returned, or None if the run was not watched.
            step: optimizer steps finished there.
        """
        if state is not None and state.get("version") == STATE_VERSION:
            self.watch.load_state_dict(state["watch"])
            self.values.load_state_dict(state["values"])
        else:
            logger.info("the checkpoint has no state of gradwatch; its steps go on from %d", step)
            self.watch.load_state_dict(self.watch.state_dict() | {"step": step})

    def close(self) -> None:
        """Takes every hook off; may be called again."""
        self._loss.remove()
        if self._weights is not None:
            self._weights.remove()
        self.watch.close()

    def _loss_source(self, arguments: TrainingArguments, model: nn.Module) -> StepLoss:
        watch = self.watch

        def is_sampled() -> bool:
            return watch.sampling

        if self._engine is None:
            return BackwardLoss(is_sampled)
        over_processes = getattr(arguments, "average_tokens_across_devices", False)
        world = arguments.world_size if over_processes else 1
        return OutputLoss(unwrap_model(model), is_sampled, world)

    def _tell(self, *, loss: torch.Tensor | None = None, epoch: float | None = None) -> None:
        # The Trainer has clipped the gradients by now.
        self.watch.observe(loss=loss, epoch=epoch, gradients=False)

"""Stage 1's trainer where a flag asks for more than LLaVA's own loss, order and learning rates.

It adds to LLaVA's trainer:

- further losses, each an `umed_plugin.training.extra_loss.ExtraLoss`: ``--umed_keep``, ``--umed_attention_loss``,
  ``--umed_tower_teacher``;
- ``--umed_replay``: the records of the highest loss twice (`umed_plugin.training.replay`);
- ``--umed_tower_lr``: a learning rate of the vision tower (`umed_plugin.training.trained_tower`).

Without these flags LLaVA's own trainer runs: `umed_plugin.patches.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DummyOptim
from llava.train.llava_trainer import LLaVATrainer, get_modality_length_grouped_indices
from torch import Tensor
from transformers import TrainerCallback

from umed_plugin.errors import UmedError, note
from umed_plugin.model.distillation import AnswerStates, answer_states, head_of, record_losses
from umed_plugin.model.forward import base_llava
from umed_plugin.training.attending import AttendingLoss
from umed_plugin.training.extra_loss import ExtraLoss
from umed_plugin.training.keeping import keeping_loss
from umed_plugin.training.replay import RECORDS, Replay, ReplayedEpochs, ReplayedLoader
from umed_plugin.training.run_precision import precision_of
from umed_plugin.training.sampler import sampler_in
from umed_plugin.training.step_metrics import takes_metrics
from umed_plugin.training.tower_teaching import tower_teaching_loss
from umed_plugin.training.trained_tower import drop_empty_groups, give_own_rate


class TuningTrainer(LLaVATrainer):
    """LLaVA's trainer with further losses, records that come twice, and a learning rate of the tower.

    Args:
        positional, keywords: as LLaVA's script gives them; the training dataset is a
            `umed_plugin.training.tuning_data.GroundedDataset`.
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        flags = self.args.umed
        self._extra: list[ExtraLoss] = []
        if flags.keeps():  # first, because clinkd divides the cross-entropy too
            self._extra.append(keeping_loss(self.model, self.args))
        if flags.umed_attention_loss > 0:
            self._extra.append(AttendingLoss(self.model, self.train_dataset, self.args))
        if flags.umed_tower_teacher is not None and flags.umed_tower_teacher_weight > 0:
            self._extra.append(tower_teaching_loss(self.model, self.args))
        self._replay = Replay(len(self.train_dataset), flags.umed_replay) if flags.umed_replay > 0 else None
        self._records: Tensor | None = None
        self._resumed_from: Path | None = None
        self.add_callback(_AfterStep(self))

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        """One batch, forward and backward."""
        inputs = self._prepare_inputs(inputs)
        self._records = inputs.pop(RECORDS, None)
        with ExitStack() as watched:
            for loss in self._extra:
                watched.enter_context(loss.watching(inputs))
            return super().training_step(model, inputs, *more)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """LLaVA's loss plus the further ones."""
        # On a GPU the Trainer's own autocast is inside the model's forward pass alone.
        with precision_of(self.args):
            for extra in self._extra:
                extra.before_pass(inputs)
        seen = self._replay is not None or any(extra.needs_answers for extra in self._extra)
        with ExitStack() as stack:
            found = stack.enter_context(answer_states(base_llava(self.model))) if seen else []
            result = super().compute_loss(model, inputs, return_outputs, **more)
        loss, answers = result[0] if return_outputs else result, found[0] if found else None
        if self._replay is not None and answers is not None:
            self._note_losses(self._replay, answers, len(inputs["input_ids"]))
        for extra in self._extra:
            loss = extra.added_to(loss, answers)
        return (loss, result[1]) if return_outputs else loss

    def _note_losses(self, replay: Replay, answers: AnswerStates, records: int) -> None:
        """Note the loss of each record of a batch, those of all processes. All must call."""
        losses = record_losses(answers, head_of(base_llava(self.model)), records, self.args.umed_logit_rows)
        if self._records is None:
            raise RuntimeError("the batch does not say which records it holds")
        replay.add(self.accelerator.gather(self._records), self.accelerator.gather(losses))

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add what was measured since the last log, over all processes."""
        if takes_metrics(logs, self.state):
            for extra in self._extra:
                logs.update(extra.metrics(self._gathered))
        super().log(logs, *rest)

    def _gathered(self, numbers: Sequence[float]) -> list[float]:
        own = torch.tensor([list(numbers)], dtype=torch.float32, device=self.args.device)
        total: list[float] = self.accelerator.gather(own).sum(dim=0).tolist()
        return total

    def create_optimizer(self, *args: Any) -> Any:
        """LLaVA's optimizer, with the tower in groups of its own.

        Raises:
            UmedError: DeepSpeed makes an optimizer of its own, with one rate for all weights.
        """
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if self.args.umed_tower_lr is not None and isinstance(optimizer, DummyOptim):
            raise UmedError(
                f"--umed_tower_lr {self.args.umed_tower_lr:g} has no effect: DeepSpeed's configuration has an optimizer, which "
                "trains all weights at one rate. Remove optimizer and scheduler from it."
            )
        if new and self.args.umed_tower_lr is not None:
            give_own_rate(optimizer, base_llava(self.model).get_vision_tower(), self.args.umed_tower_lr)
            if self.args.deepspeed:
                drop_empty_groups(optimizer)  # as `umed_plugin.patches.empty_groups` before
        return optimizer

    # The order with --umed_replay

    def _get_train_sampler(self, *data: Any) -> Any:
        if self._replay is None:
            return super()._get_train_sampler(*data)
        args = self.args
        split = args.world_size * args.gradient_accumulation_steps
        return ReplayedEpochs(
            self._replay,
            self._order,
            split * args.train_batch_size,
            fills=split > 1 or args.dataloader_drop_last,
            numbered=args.umed_augment,
        )

    def _order(self, indices: Sequence[int], epoch: int) -> list[int]:
        """Indices in the order of an epoch, which follows from the seed and the epoch: that of a run without replay."""
        args = self.args
        seed = (args.data_seed if args.data_seed is not None else args.seed) + epoch
        if not args.group_by_modality_length:
            shuffle = torch.Generator().manual_seed(seed)
            return [indices[place] for place in torch.randperm(len(indices), generator=shuffle).tolist()]
        lengths = self.train_dataset.modality_lengths
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, whose state is not restored here.
            torch.default_generator.manual_seed(seed)
            split = args.world_size * args.gradient_accumulation_steps
            places = get_modality_length_grouped_indices([lengths[i] for i in indices], args.train_batch_size, split)
        return [indices[place] for place in places]

    def get_train_dataloader(self) -> Any:
        """The loader; with --umed_replay one that is as long as the run."""
        loader = super().get_train_dataloader()
        if self._replay is None:
            return loader
        args, checkpoint = self.args, self._resumed_from
        sampler = sampler_in(loader)
        return ReplayedLoader(
            loader,
            sampler,
            args.max_steps * args.gradient_accumulation_steps,
            args.gradient_accumulation_steps,
            lambda: self._load_rng_state(str(checkpoint)),
        )

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> Any:
        checkpoint = keywords.get("resume_from_checkpoint")
        self._resumed_from = None if checkpoint is None else Path(checkpoint)
        if self._resumed_from is not None:
            for extra in self._extra:
                extra.load(self._resumed_from)
        if self._replay is None:
            return super()._inner_training_loop(*positional, **keywords)
        if self._resumed_from is not None:
            self._replay.load(self._resumed_from)
        # The loader begins where the checkpoint ended: transformers would count epochs of equal length.
        self.args.ignore_data_skip = True
        if self.args.max_steps <= 0:
            self.args.max_steps = self._get_train_sampler().steps_of(self.args.num_train_epochs)
        if self.args.process_index == 0:
            note(
                f"from the second epoch on, {self._replay.count} of {len(self.train_dataset)} records come twice. The run has "
                f"{self.args.max_steps} steps."
            )
        return super()._inner_training_loop(*positional, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            return  # the result of the run, from which none is resumed
        if self.args.should_save:  # transformers 5 comes here in every process
            for extra in self._extra:
                extra.save(Path(output_dir))
            if self._replay is not None:
                self._replay.save(Path(output_dir))

    def step_is_done(self, control: Any) -> None:
        """After each optimizer step: let the losses follow, and count the step in its epoch."""
        for extra in self._extra:
            extra.after_step()
        if self._replay is None:
            return
        replay, sampler = self._replay, self._get_train_sampler()
        replay.steps += 1
        steps = sampler.steps(replay.epoch)
        self.state.epoch = replay.epoch + replay.steps / steps
        if replay.steps == steps:  # transformers sees one long epoch
            control.should_save |= self.args.save_strategy == "epoch"
            control.should_log |= self.args.logging_strategy == "epoch"


class _AfterStep(TrainerCallback):
    """Tells the trainer when an optimizer step is done."""

    def __init__(self, trainer: TuningTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Called by transformers."""
        self._trainer.step_is_done(control)

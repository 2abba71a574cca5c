"""Let a run whose epochs do not divide into whole optimizer steps go on with the batch at which it was stopped.

Target: `LLaVATrainer._inner_training_loop`, inherited from transformers 4.
Why: an epoch of 5 batches with ``--gradient_accumulation_steps 2`` gives 2 steps, and its last batch begins a step that the next
epoch ends. On resume transformers 4 counts 2 steps an epoch all the same. So it goes on behind batches that were never learnt
from, and their number grows with each epoch.
Versions: LLaVA 1.2.x, transformers 4.36 and 4.37. In transformers 5 an epoch's end ends a step.
Delete when: LLaVA's pins are no longer used.

Only with ``--umed_stage``: our samplers' order depends only on the seed and the epoch. Where an epoch has fewer batches than a
step, `short_epochs` has made the step shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from umed_plugin.errors import note
from umed_plugin.patches.training_run import BEFORE_5, LLAVA, TRAINING_LOOP_4
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method. Our own trainer inherits it."""
    from llava.train.llava_trainer import LLaVATrainer

    stock = LLaVATrainer._inner_training_loop

    def _inner_training_loop(self: Any, *positional: Any, **keywords: Any) -> Any:
        checkpoint = keywords.get("resume_from_checkpoint")
        steps = _steps_done(checkpoint) if _takes_part(self.args) else 0
        if not steps:
            return stock(self, *positional, **keywords)
        stock_loader, skips = self.get_train_dataloader, self.args.ignore_data_skip
        self.get_train_dataloader = lambda: _resumed(self, stock_loader(), steps, str(checkpoint))
        try:
            return stock(self, *positional, **keywords)
        finally:
            del self.get_train_dataloader
            self.args.ignore_data_skip = skips

    recorder.replace(LLaVATrainer, "_inner_training_loop", _inner_training_loop)


def _takes_part(args: Any) -> bool:
    return (
        getattr(args, "umed_stage", None) is not None
        and args.gradient_accumulation_steps > 1
        and not args.ignore_data_skip
    )


def _steps_done(checkpoint: Any) -> int:
    """Optimizer steps of a checkpoint; 0 if there is none."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    file = Path(checkpoint or "") / TRAINER_STATE_NAME
    return int(TrainerState.load_from_json(str(file)).global_step) if checkpoint and file.is_file() else 0


def _resumed(trainer: Any, loader: Any, steps: int, checkpoint: str) -> Any:
    """The loader of a run that has done so many steps; as it is where transformers finds the place."""
    args, length = trainer.args, len(loader)
    accumulation = args.gradient_accumulation_steps
    if length % accumulation == 0:
        return loader
    epoch, batches = divmod(steps * accumulation, length)
    steps_an_epoch = length // accumulation
    if args.process_index == 0:
        note(
            f"resuming behind {batches} of {length} batches of epoch {epoch + 1}. (An epoch does not fill whole optimizer steps.)"
        )
    _begin(loader, epoch)
    args.ignore_data_skip = True  # the loader begins where it has to, and loads the random state when it has begun
    trainer.add_callback(_epochs_by_batches(length, accumulation))
    last = steps // steps_an_epoch  # the epoch in which transformers believes to be: it asks for no earlier one
    return _ResumedLoader(loader, batches, last - epoch + 1, lambda: trainer._load_rng_state(checkpoint))


def _begin(loader: Any, epoch: int) -> None:
    """Let our sampler's next iteration be that of an epoch, counted from 0."""
    from umed_plugin.training.sampler import sampler_in

    sampler_in(loader).epochs_begun = epoch


class _ResumedLoader:
    """A data loader whose first iteration leaves out some batches, and goes on through several epochs.

    Args:
        loader: of whole epochs.
        batches: left out of the first one.
        epochs: of the first iteration.
        begun: called when the first batch is there.
    """

    def __init__(self, loader: Any, batches: int, epochs: int, begun: Callable[[], None]) -> None:
        self._loader, self._batches, self._epochs, self._begun = loader, batches, epochs, begun
        self._resuming = True

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        if not self._resuming:
            yield from self._loader
            return
        from accelerate import skip_first_batches

        self._resuming = False
        first = skip_first_batches(self._loader, self._batches) if self._batches else self._loader
        for number in range(self._epochs):
            for index, batch in enumerate(self._loader if number else first):
                if number == index == 0 and self._batches:
                    self._begun()
                yield batch


def _epochs_by_batches(length: int, accumulation: int) -> Any:
    """A callback that corrects the epoch in the log, which transformers counts from where it believes to be."""
    from transformers import TrainerCallback

    class EpochsByBatches(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            state.epoch = state.global_step * accumulation / length

    return EpochsByBatches


PATCH = Patch(
    name="resumed_batches",
    targets=(
        Target("llava.train.llava_trainer:LLaVATrainer", LLAVA, ()),
        TRAINING_LOOP_4,
    ),
    why="where an epoch does not divide into whole optimizer steps, transformers 4 resumes behind batches that were never "
    "learnt from",
    delete_when="LLaVA's pins are no longer used",
    change=change,
    needed=BEFORE_5,
)

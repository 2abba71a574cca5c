"""Let an optimizer step whose batches an epoch does not have take the whole epoch, as in transformers 5.

Target: `LLaVATrainer._inner_training_loop`, inherited from transformers 4.
Why: an epoch may have fewer batches per process than ``--gradient_accumulation_steps``. There transformers 4 ends steps at two
kinds of places: behind each epoch, and behind as many batches as the flag says. At the first kind no process hears of the others'
gradients, so their weights drift apart. Each end counts as a step, so the run is over before its last epoch. And the loss of a
few batches is divided by the flag.
Versions: LLaVA 1.2.x, transformers 4.36 and 4.37. In transformers 5 an epoch's end ends a step.
Delete when: LLaVA's pins are no longer used.

Only with ``--umed_stage``. It also says when longer epochs that do not fill whole steps let the run end early. transformers 4
counts the whole steps of an epoch, and not what is left over.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.errors import note, warn
from umed_plugin.patches.training_run import BEFORE_5, LLAVA, TRAINING_LOOP_4
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method. Our own trainers inherit it."""
    from llava.train.llava_trainer import LLaVATrainer

    stock = LLaVATrainer._inner_training_loop

    def _inner_training_loop(self: Any, *positional: Any, **keywords: Any) -> Any:
        given = self.args.gradient_accumulation_steps
        if getattr(self.args, "umed_stage", None) is None or given == 1:
            return stock(self, *positional, **keywords)
        stock_loader = self.get_train_dataloader

        def get_train_dataloader() -> Any:
            """The loop asks for it before it reads how many batches a step has."""
            loader = stock_loader()
            _fit(self, len(loader))
            return loader

        self.get_train_dataloader = get_train_dataloader
        try:
            return stock(self, *positional, **keywords)
        finally:
            # Where `resumed_batches`, further in, acts, it has taken this away already.
            self.__dict__.pop("get_train_dataloader", None)
            if self.args.gradient_accumulation_steps != given:
                _accumulate(self, given)

    recorder.replace(LLaVATrainer, "_inner_training_loop", _inner_training_loop)


def _fit(trainer: Any, batches: int) -> None:
    """Let a step take no more batches than an epoch has per process. Say where whole steps are lacking at the end."""
    args = trainer.args
    given, first = args.gradient_accumulation_steps, args.process_index == 0
    if 0 < batches < given:
        _accumulate(trainer, batches)
        if first:
            note(
                f"an epoch has {batches} batches per process, fewer than --gradient_accumulation_steps {given}. So each "
                f"optimizer step takes {batches}, as with --gradient_accumulation_steps {batches}."
            )
    elif first and (text := early_end(batches, given, args.num_train_epochs, args.max_steps)):
        warn(text)


def early_end(batches: int, accumulation: int, epochs: float, max_steps: int) -> str | None:
    """How many steps a run lacks at its end because its epochs do not fill whole steps; None if it lacks none.

    Args:
        batches: of an epoch, per process.
        accumulation: batches of a step, at most ``batches``.
        epochs: ``--num_train_epochs``.
        max_steps: ``--max_steps``; above 0 it says how long the run is.
    """
    steps = -(-epochs * (batches // accumulation) // 1)
    whole = epochs * batches // accumulation
    if max_steps > 0 or not batches or whole <= steps:
        return None
    return (
        f"an epoch has {batches} batches per process, which do not fill whole optimizer steps of --gradient_accumulation_steps "
        f"{accumulation}. The run has {steps:.0f} steps, and ends after {steps * accumulation / batches:.1f} of {epochs:g} "
        f"epochs. For all of them, add --max_steps {whole:.0f}."
    )


def _accumulate(trainer: Any, steps: int) -> None:
    """Let a step take this many batches, in the loop, in accelerate and in DeepSpeed's settings."""
    args, accelerator = trainer.args, trainer.accelerator
    args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = steps
    if args.deepspeed:
        # accelerate corrects one of the two numbers alone, and DeepSpeed refuses what does not fit together.
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_accumulation_steps"] = steps
        settings["train_batch_size"] = args.train_batch_size * args.world_size * steps


PATCH = Patch(
    name="short_epochs",
    targets=(
        Target("llava.train.llava_trainer:LLaVATrainer", LLAVA, ()),
        TRAINING_LOOP_4,
    ),
    why="where an epoch has fewer batches than a step, transformers 4 ends steps at two kinds of places, lets the processes' "
    "weights drift apart, and ends before the last epoch",
    delete_when="LLaVA's pins are no longer used",
    change=change,
    needed=BEFORE_5,
)

"""Early stopping: end a stage when its held-out score no longer rises, and keep the weights of its best validation.

The score of a validation is the mean of ``val/iou`` and ``val/accuracy`` (`umed_plugin.training.validation`), of those that the
held-out studies can give. In stage 2 the validation before the first step counts, so a stage 2 that only loses ends where it
began. In stage 1 it does not: a checkpoint that names abnormalities and gives no boxes has a high score by its accuracy alone. At
first it loses some of that while it learns to give boxes (seen in this project).

All that decides is read from the log of the trainer's state, which each checkpoint holds. So a resumed run stops at the same
step and keeps the same weights. The best weights lie in ``best_weights/`` of the output folder: all that is trained, one file.
They stay there after the run, and may be removed then.

How to run: ``--umed_val_every 50 --umed_stop_after 4`` in either stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from umed_plugin.errors import UmedError, note, warn
from umed_plugin.files import replacing
from umed_plugin.flags.rules import TUNING
from umed_plugin.training.first_process import first_process_does

FOLDER = "best_weights"
KEPT_STEP = "val/kept_step"
KEPT_FROM = "val/kept_from"  # the first step that counts since the best weights were lost
SCORED = ("val/iou", "val/accuracy")
_VALUE_HEAD = "value_head."


@dataclass(frozen=True)
class Validated:
    """One validation: the step after which it was, and its score, 0-1."""

    step: int
    score: float


def validations(log_history: Sequence[dict[str, Any]]) -> list[Validated]:
    """The validations in a trainer's log, in their order."""
    found = []
    for entry in log_history:
        values = [entry[name] for name in SCORED if name in entry]
        if values:
            found.append(Validated(int(entry["step"]), sum(values) / len(values)))
    return found


def best_of(validated: Sequence[Validated]) -> Optional[Validated]:
    """The first of the validations with the highest score; None if there is none."""
    return max(validated, key=lambda found: found.score, default=None)


def without_gain(validated: Sequence[Validated]) -> int:
    """How many validations have followed the best one."""
    best = best_of(validated)
    return 0 if best is None else sum(found.step > best.step for found in validated)


class EarlyStopping(TrainerCallback):
    """Ends a run after ``--umed_stop_after`` validations without gain. Its validation must be an earlier callback.

    Args:
        trainer: of either stage, with `umed_plugin.training.validation.HeldOutValidation` among its callbacks.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._folder = Path(trainer.args.output_dir) / FOLDER
        self._patience: int = trainer.args.umed.umed_stop_after
        self._of_checkpoint: int | None = None  # the best step when the last checkpoint was written
        self._first = 1 if trainer.args.umed.umed_stage == TUNING else 0  # step of the first validation that counts

    def validated(self) -> list[Validated]:
        """The validations so far whose weights could be kept: none from before the best weights were lost."""
        log = self.trainer.state.log_history
        since = max([self._first, *(entry[KEPT_FROM] for entry in log if KEPT_FROM in entry)])
        return [found for found in validations(log) if found.step >= since]

    def ended(self) -> bool:
        """Whether the run has seen enough validations without gain."""
        return without_gain(self.validated()) >= self._patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Keep the weights before the first step of stage 2, or find those that the stopped run has kept.

        Raises:
            UmedError: the run had ended, and its best weights are missing.
        """
        if state.global_step == 0:
            self._keep_if_best()
            return
        best = best_of(self.validated())
        lost = best is not None and not self._file(best.step).is_file()
        # The first process has written it, perhaps on another machine; all must go on alike.
        own = torch.tensor([float(lost)], device=args.device)
        if best is not None and self.trainer.accelerator.gather(own)[0]:
            self._refuse_if_finished(best)
            if args.process_index == 0:
                warn(
                    f"{self._file(best.step)} is missing: the weights of the best validation, after step {best.step}, are lost. "
                    f"This run keeps the best from step {state.global_step} on."
                )
            # In the log, so that the next resumed run keeps on from there too.
            state.log_history.append({KEPT_FROM: state.global_step + 1, "step": state.global_step})
            best = None
        self._of_checkpoint = None if best is None else best.step

    def _refuse_if_finished(self, best: Validated) -> None:
        """Raise a `UmedError` for a run that had ended: without the best weights, its last ones would replace its result."""
        state = self.trainer.state
        if best.step != state.global_step and (self.ended() or 0 < state.max_steps <= state.global_step):
            raise UmedError(
                f"this run had ended after step {state.global_step}, and {self._file(best.step)}, its best weights, is missing. "
                f"What it saved in {self._folder.parent} is left as it is. To go on from the last step, raise --umed_stop_after "
                "or the number of steps; to train anew, choose another --output_dir."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Keep the weights if the validation after this step is the best, and end the run after too many without gain."""
        if not self.validated() or self.validated()[-1].step != state.global_step:
            return
        self._keep_if_best()
        if self.ended():
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Remember which weights a run needs that resumes from this checkpoint."""
        best = best_of(self.validated())
        self._of_checkpoint = None if best is None else best.step

    def _keep_if_best(self) -> None:
        best, step = best_of(self.validated()), self.trainer.state.global_step
        if best is None or best.step != step or not self.trainer.args.should_save:
            return
        with replacing(self._file(step)) as partial:
            save_file(dict(self._trained()), partial)
        for file in self._folder.glob("step-*.safetensors"):
            if file not in (self._file(step), self._file(self._of_checkpoint)):
                file.unlink()

    def _file(self, step: int | None) -> Path:
        return self._folder / f"step-{step}.safetensors"

    def _trained(self) -> list[tuple[str, Tensor]]:
        """Name and value of all that is trained, in main memory."""
        return [(name, tensor.detach().cpu().contiguous()) for name, tensor in self._parameters()]

    def _parameters(self) -> list[tuple[str, Tensor]]:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        found = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        if any(hasattr(parameter, "ds_id") for _, parameter in found):
            # The flags are checked for that; this door holds whatever has switched ZeRO-3 on.
            raise UmedError(
                "--umed_stop_after does not work with ZeRO-3: no process has all weights to keep. Use ZeRO-2, or set "
                "--umed_stop_after 0."
            )
        head = getattr(self.trainer, "value_head", None)
        own = [] if head is None else [(_VALUE_HEAD + name, parameter) for name, parameter in head.named_parameters()]
        return found + own

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model of every process, after the run and before LLaVA saves it.

        In every process, because which of them write is LLaVA's and transformers' decision. Their weights are alike, so the file
        of the first one serves all: on another machine it may be missing.

        Raises:
            UmedError: they do not fit the model.
        """
        state, args, best = self.trainer.state, self.trainer.args, best_of(self.validated())
        if best is None:
            return
        if best.step != state.global_step:
            first_process_does(lambda: self._load(self._file(best.step)), "read the best weights")
            self._share()
        state.log_history.append({KEPT_STEP: best.step, "step": state.global_step})
        if args.process_index == 0:
            note(self._words(best))

    def _load(self, file: Path) -> None:
        """Put a file's weights into the model of this process."""
        kept, parameters = load_file(file), dict(self._parameters())
        if {name: tensor.shape for name, tensor in kept.items()} != {n: p.shape for n, p in parameters.items()}:
            raise UmedError(f"{file}: holds other weights than this run trains. Remove the folder and train anew.")
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])

    def _share(self) -> None:
        """Give all processes the trained weights of the first one."""
        if dist.is_available() and dist.is_initialized():
            for _, parameter in self._parameters():
                dist.broadcast(parameter.data, 0)

    def _words(self, best: Validated) -> str:
        """What was kept, and why the run ended."""
        log = self.trainer.state.log_history
        entry = next(line for line in log if line.get("step") == best.step and {*SCORED} & {*line})
        values = ", ".join(f"{name} {entry[name]:.3f}" for name in SCORED if name in entry)
        ended = self.trainer.state.global_step
        why = (
            f"training ended after step {ended}: {without_gain(self.validated())} validations without gain."
            if self.ended()
            else f"training ended after its last step, {ended}, and had not yet seen {self._patience} validations without gain."
        )
        return f"{why} Kept are the weights after step {best.step}: {values}."

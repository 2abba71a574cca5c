"""A run whose weights become NaN or infinite ends there, and no checkpoint holds such weights.

transformers logs a loss of NaN as 0 and trains on (``logging_nan_inf_filter``); its last save then replaces the result. The
weights are looked at, not the loss: under fp16 a step may overflow, and the loss scaler leaves it out. It costs one read of the
trained weights, before each log and each save. Where the model answers while it trains, its logits are looked at too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from umed_plugin.errors import UmedError
from umed_plugin.model.sampling import NOT_FINITE, NotFiniteError
from umed_plugin.training.run_settings import last_checkpoint
from umed_plugin.training.stopping import on_any_rank, raised_together


class FiniteWeights(TrainerCallback):
    """Ends a run with trained weights that are not finite. It must be the last callback that may ask for a save.

    Args:
        trainer: of either stage.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Look at the weights to start from; a checkpoint to resume from is loaded by now.

        Raises:
            UmedError: on all ranks.
        """
        if has_broken_weights(self._trainer):
            found = last_checkpoint(Path(args.output_dir)) if state.global_step else None
            source = found or "the checkpoint of --model_name_or_path, or what is trained on top of it,"
            raise UmedError(
                f"{source} has NaN or infinite values among the weights to train. Start from another one: umed doctor finds "
                "them in a checkpoint. A folder checkpoint-N with such weights must go before the run can resume."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Before a log or a save, and after the last step.

        Raises:
            UmedError: on all ranks.
        """
        if control.should_log or control.should_save or control.should_training_stop:
            self._check()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)

    def _check(self) -> None:
        if has_broken_weights(self._trainer):
            raise UmedError(broken_run(self._trainer, "trained weights are NaN or infinite"))


@torch.no_grad()
def has_broken_weights(trainer: Any) -> bool:
    """Whether a trained weight of any rank, also of PPO's value network, is NaN or infinite. All ranks must call."""
    head = getattr(trainer, "value_head", None)
    modules = [trainer.model] if head is None else [trainer.model, head]
    trained = [_own_part(p) for module in modules for p in module.parameters() if p.requires_grad]
    device = trainer.args.device
    finite = [part.isfinite().all().to(device) for part in trained if part.numel()]
    return on_any_rank(trainer, bool(finite) and not torch.stack(finite).all())


def broken_run(trainer: Any, found: str) -> str:
    """The message that a run has learnt until its numbers were no more; ``found`` says where that showed."""
    args, step = trainer.args, trainer.state.global_step
    if step == 0:
        return (
            f"before the first step, {found}. The checkpoint to start from has such values (umed doctor finds them), or --fp16 "
            "is too narrow for it: use --bf16."
        )
    folder = last_checkpoint(Path(args.output_dir))
    earlier = folder is not None and int(re.sub(r".*-", "", folder.name)) <= step
    narrow = " Or an input is too large for --fp16: use --bf16." if getattr(args, "fp16", False) else ""
    last = f"The last checkpoint before is {folder}" if earlier else "No checkpoint was saved before"
    return (
        f"training stopped after step {step}: {found}. {last}; this step was not saved. Most often --learning_rate is too high "
        f"({args.learning_rate:g}). Train anew with a lower one and another --output_dir.{narrow} If this happens in the first "
        "steps at any rate, umed doctor looks for NaN in the checkpoint."
    )


def _own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a weight. ZeRO-3 has its parts outside of the parameter, the last one padded with anything."""
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    rank = torch.distributed.get_rank(group=getattr(parameter, "ds_process_group", None))
    left = max(0, parameter.ds_numel - rank * part.numel())
    return part.detach().flatten()[:left]


def raised_by_all(on_any: Callable[[bool], bool]) -> AbstractContextManager[None]:
    """A block in which the model answers: if the logits of one rank are not finite, all raise `NotFiniteError`. All enter it."""
    return raised_together(on_any, NotFiniteError, f"{NOT_FINITE} (in another process)", (NotFiniteError,))


@contextmanager
def answering(trainer: Any) -> Iterator[None]:
    """`raised_by_all` with the message of `broken_run`.

    Raises:
        UmedError: on all ranks.
    """
    try:
        with raised_by_all(lambda own: on_any_rank(trainer, own)):
            yield
    except NotFiniteError as error:
        raise UmedError(broken_run(trainer, str(error))) from None

"""What a further loss of stage 1 is to its trainer: `umed_plugin.training.tuning_trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from umed_plugin.model.distillation import AnswerStates

# Sums of this process's numbers over all of them. All processes must call it, with equally many.
Gather = Callable[[Sequence[float]], list[float]]


class ExtraLoss(Protocol):
    """A loss that is added to LLaVA's own in each batch.

    Attributes:
        needs_answers: whether `added_to` needs the states of the supervised tokens.
    """

    needs_answers: bool

    def watching(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """The context of one batch's forward and backward pass. Takes entries out of the batch that LLaVA does not know."""

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Called with the batch as LLaVA gets it, before its forward pass, in the precision of the run."""

    def added_to(self, loss: Tensor, answers: AnswerStates | None) -> Tensor:
        """``loss``, a scalar, with this one added, once the forward pass is over."""

    def metrics(self, gather: Gather) -> dict[str, float]:
        """What to log since the last call."""

    def after_step(self) -> None:
        """Called on all processes after each optimizer step."""

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what a resumed run needs."""

    def load(self, folder: Path) -> None:
        """Read it again."""


class PlainLoss:
    """What an `ExtraLoss` does by default: nothing."""

    needs_answers = False

    @contextmanager
    def watching(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Watch nothing."""
        yield

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Do nothing."""

    def after_step(self) -> None:
        """Do nothing."""

    def save(self, folder: Path) -> None:
        """Write nothing."""

    def load(self, folder: Path) -> None:
        """Read nothing."""

"""Files that stage 2 adds to a checkpoint, so that a resumed run continues as if it had not been interrupted.

- ``rewarding_state.json``: algorithm, the weight of the KL that ``--umed_kl_target`` has reached, the states of rewards that
  change over a run, and how many further queries ``--umed_dynamic_sampling`` has taken
- ``rollout_<rank>.pt``: the rollout that the rank was learning from, if the checkpoint lies between its updates
- ``value_head.safetensors``: see `umed_plugin.training.value_head`

The sampler has no file: its order follows from the seed and the number of steps (see `umed_plugin.training.sampler`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from umed_plugin import files
from umed_plugin.errors import UmedError
from umed_plugin.faults import Faults, validated

STATE = "rewarding_state.json"


class _StateForm(BaseModel):
    """Keys and types of ``rewarding_state.json``; checkpoints of earlier versions have some of the keys."""

    model_config = ConfigDict(strict=True, extra="allow")

    umed_algorithm: Optional[str] = None
    kl_coef: Annotated[Optional[FiniteFloat], Field(ge=0)] = None
    rewards: dict[str, Any] = {}
    further_queries: Annotated[int, Field(ge=0)] = 0


def rollout_file(folder: Path, rank: int | str) -> Path:
    """Where a rank keeps its rollout."""
    return folder / f"rollout_{rank}.pt"


def save_state(folder: Path, algorithm: str, kl_coef: float, rewards: dict[str, Any], further: int = 0) -> None:
    """Write ``rewarding_state.json``.

    Args:
        folder: the checkpoint.
        algorithm, kl_coef: of the run.
        rewards: states of rewards by name.
        further: number of further queries taken, over all ranks.
    """
    state: dict[str, Any] = {"umed_algorithm": algorithm, "kl_coef": kl_coef}
    state |= {"rewards": rewards} if rewards else {}
    state |= {"further_queries": further} if further else {}
    files.write_json(folder / STATE, state, indent=None)


def load_rewards(folder: Path) -> dict[str, Any]:
    """The states of rewards in a checkpoint by name; empty if it has none."""
    return dict(_read(folder).get("rewards", {}))


def load_further(folder: Path) -> int:
    """How many further queries were taken before the checkpoint; 0 if it does not say."""
    return int(_read(folder).get("further_queries", 0))


def _read(folder: Path) -> dict[str, Any]:
    """The file's content, its types checked; empty if the checkpoint has no such file."""
    file = folder / STATE
    if not file.is_file():
        return {}
    state, faults = files.read_object(file), Faults()
    validated(_StateForm, state, f"{file}: ", faults)
    faults.raise_if_any(f"{file} is damaged (remedy: resume from an earlier checkpoint)")
    return state


def load_kl_coef(folder: Path, algorithm: str, *, needed: bool) -> float | None:
    """The weight of the KL in a checkpoint; None if the checkpoint has no ``rewarding_state.json``.

    Args:
        folder: the checkpoint.
        algorithm: of this run.
        needed: whether the run adapts the weight and cannot continue without it.

    Raises:
        UmedError: the checkpoint was written by the other algorithm, or lacks a needed weight.
    """
    state = _read(folder)
    if state.get("umed_algorithm", algorithm) != algorithm:
        raise UmedError(
            f"{folder} was written by --umed_algorithm {state['umed_algorithm']}, but this run has {algorithm}. Resume with the "
            "algorithm that the run was started with, or choose another --output_dir."
        )
    if needed and "kl_coef" not in state:
        raise UmedError(
            f"{folder}: has no {STATE}, so the KL weight that --umed_kl_target had reached is lost. It was written by an earlier "
            "release, or with --save_only_model by one. Resume without --umed_kl_target, or choose another --output_dir."
        )
    return state.get("kl_coef")

"""Reads a run's folder: evaluations of its stages, logs of its trainings, sampled answers of stage 2.

A folder of ``umed demo`` or ``umed upgrade`` has ``evaluation/STAGE/`` and ``runs/NAME/``. The output folder of one training can
be read too, and so can an unfinished run: what is not there yet is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from umed_plugin.commands.report.forms import CandidatesForm, FlagsForm, TrainerStateForm
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.forms import check_lines, check_object
from umed_plugin.evaluation.results import SUMMARY, Evaluation
from umed_plugin.files import parse_json, read_object

# In the order in which a run goes through them; evaluations under other names come after these.
STAGES = {"base": "base", "instruction_tuning": "stage 1", "rewarding": "stage 2"}

_TRIAL, _OF_AN_UPGRADE = "trial-", "run.yaml"  # as `umed upgrade` names the folder of a trial, and its settings
_LONGEST_COMMAND = 100_000  # characters of a log's first line
_REMEDY = "remove it, or go on with the training"


@dataclass(frozen=True)
class Training:
    """One training's log.

    Attributes:
        name: of its folder.
        stage: ``instruction_tuning``, ``rewarding``, or None for a training without the plugin's flags.
        log: rows of the trainer's ``log_history``, one every ``--logging_steps``.
        steps: optimizer steps done.
        of_steps: optimizer steps planned.
        settings: every flag that decides the result, as ``umed.json`` holds it. Of a training without the plugin, the flags that
            the first line of its log in ``logs/`` holds, as `umed demo` writes it; else empty.
        made_with: versions, commit, machine and time of the last write, likewise.
        trial: whether it is the short stage 2 by which ``rewarding: auto`` decides. Its weights are no result.
    """

    name: str
    stage: str | None
    log: list[dict[str, Any]]
    steps: int
    of_steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    trial: bool = False

    @property
    def label(self) -> str:
        """What it trained, for readers."""
        label = stage_label(self.stage or self.name)
        return f"trial of {label}" if self.trial else label

    @property
    def seconds(self) -> float | None:
        """Duration of its last start, as the trainer measured it; None before its end."""
        ended = [row["train_runtime"] for row in self.log if "train_runtime" in row]
        return float(ended[-1]) if ended and math.isfinite(ended[-1]) else None


@dataclass(frozen=True)
class Run:
    """Everything that a report shows.

    Attributes:
        evaluations: stage -> its evaluation, in the order of `STAGES`.
        trainings: in the order of their stages, the trial before the stage that it tries.
        candidates: lines of ``candidates.jsonl`` of all trainings but the trial (`umed_plugin.training.candidate_log`).
    """

    folder: Path
    evaluations: dict[str, Evaluation]
    trainings: list[Training]
    candidates: list[dict[str, Any]]


def read_run(folder: Path | str) -> Run:
    """Read a run's folder.

    Raises:
        UmedError: it does not exist, holds neither an evaluation nor a training's log, or a file in it is damaged.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UmedError(f"{folder}: there is no such folder. Give the folder of a run, e.g. the --out of `umed demo`.")
    evaluated = [path.parent for path in (folder / "evaluation").glob(f"*/{SUMMARY}")]
    evaluations = {path.name: Evaluation.load(path) for path in sorted(evaluated, key=_stage_rank)}
    trained = [folder, *sorted(path for path in (folder / "runs").glob("*") if path.is_dir())]
    tried = {path for path in trained[1:] if path.name.startswith(_TRIAL) and (folder / _OF_AN_UPGRADE).is_file()}
    trainings = [
        replace(training, trial=path in tried) for path in trained if (training := read_training(path)) is not None
    ]
    trainings.sort(key=lambda training: (("", *STAGES).index(training.stage or ""), not training.trial))
    candidates = [line for path in trained if path not in tried for line in read_candidates(path / "candidates.jsonl")]
    if not evaluations and not trainings and not candidates:
        raise UmedError(
            f"{folder}: holds nothing to report: neither evaluation/STAGE/evaluation.json, nor trainer_state.json (of a "
            "training's output folder) here or in runs/NAME/. A training writes the latter at its end and with each checkpoint."
        )
    return Run(folder, evaluations, trainings, candidates)


def stage_label(stage: str) -> str:
    """The name of a stage for readers."""
    return STAGES.get(stage, stage.replace("_", " "))


def _stage_rank(folder: Path) -> tuple[int, str]:
    known = list(STAGES)
    return (known.index(folder.name) if folder.name in known else len(known), folder.name)


def read_training(folder: Path) -> Training | None:
    """The log of a training, finished or not; None if there is none.

    Raises:
        UmedError: trainer_state.json or umed.json is damaged.
    """
    file = newest_state(folder)
    if file is None:
        return None
    state, flags = _read_state(file), {}
    marker = next((path for path in (folder / "umed.json", file.parent / "umed.json") if path.is_file()), None)
    if marker:
        flags = read_object(marker)
        check_object(marker, flags, FlagsForm, _REMEDY)
    stage = flags.get("umed_stage")
    rows = [row for row in state.get("log_history", []) if "step" in row]
    return Training(
        folder.name,
        stage if stage in STAGES else None,
        rows,
        state.get("global_step", 0),
        state.get("max_steps", 0),
        flags.get("settings") or ({} if marker else _logged_flags(folder)),
        flags.get("made_with") or {},
    )


def newest_state(folder: Path) -> Path | None:
    """The trainer_state.json behind most steps: the folder's own, which a training writes at its end, or a checkpoint's.

    A training that goes on behind its end leaves the old one until its new end.

    Raises:
        UmedError: a trainer_state.json is damaged.
    """
    kept = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    newest = max(kept, key=lambda path: int(path.parent.name[11:]), default=None)
    own = folder / "trainer_state.json"
    if not own.is_file():
        return newest
    behind = newest is not None and _read_state(own).get("global_step", 0) < int(newest.parent.name[11:])
    return newest if behind else own


def _read_state(file: Path) -> dict[str, Any]:
    state = read_object(file)
    check_object(file, state, TrainerStateForm, _REMEDY)
    return state


def _logged_flags(folder: Path) -> dict[str, Any]:
    """The flags in the command at the top of a training's log; empty without one."""
    logs = sorted((folder.parent.parent / "logs").glob("*.log"))
    log = next((path for path in logs if folder.name.startswith(f"{path.stem}-")), None)
    if log is None:
        return {}
    with open(log, encoding="utf-8", errors="replace") as stream:
        words = stream.readline(_LONGEST_COMMAND).split()
    words = words[words.index("--output_dir") :] if "--output_dir" in words else []
    return {name[2:]: _number(value) for name, value in zip(words, words[1:]) if name.startswith("--")}


def _number(text: str) -> Any:
    """An int or a float where the text is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_candidates(file: Path) -> list[dict[str, Any]]:
    """The lines of ``candidates.jsonl``; none if there is no file. A last line that a run is still writing is left out.

    Raises:
        UmedError: a line is damaged.
    """
    lines = list(_lines(file))
    check_lines(file, lines, CandidatesForm, "remove these lines")
    return lines


def _lines(file: Path) -> Iterator[Any]:
    """What the lines of a JSONL file hold, but for what stands behind the last line's end."""
    if not file.is_file():
        return
    # As bytes: the last line may end inside a letter.
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield parse_json(line)
            except ValueError as error:
                raise UmedError(
                    f"{file}:{number}: is not JSON ({error}). Remove the line, or write it again."
                ) from error

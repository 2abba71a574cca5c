"""What a run has left in its folder: evaluations of its stages, the logs of its trainings, sampled answers of stage 2.

A folder of ``umed demo`` or ``umed upgrade`` has ``evaluation/STAGE/`` and ``runs/NAME/``; the output folder of one training is
read too, and so is a run that is not finished: what is not there yet is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.evaluation.grounded import Case, Evaluation

# In the order in which a run goes through them; an evaluation under another name comes after these.
STAGES = {"base": "base", "instruction_tuning": "stage 1", "rewarding": "stage 2"}

_CASE_FIELDS = {field.name for field in dataclasses.fields(Case)}
_NEEDED = {
    field.name
    for field in dataclasses.fields(Case)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
}


@dataclass(frozen=True)
class Training:
    """One training's log.

    Attributes:
        name: of its folder.
        stage: ``instruction_tuning``, ``rewarding``, or None for a training without the plugin's flags.
        log: the rows of the trainer's ``log_history``, one every ``--logging_steps``.
        steps: optimizer steps done.
        of_steps: optimizer steps planned.
    """

    name: str
    stage: str | None
    log: list[dict[str, Any]]
    steps: int
    of_steps: int


@dataclass(frozen=True)
class Run:
    """All that a report shows.

    Attributes:
        evaluations: stage -> its evaluation, in the order of `STAGES`.
        trainings: in the order of their stages.
        candidates: lines of ``candidates.jsonl`` of all trainings (`umed_plugin.training.candidate_log`).
    """

    folder: Path
    evaluations: dict[str, Evaluation]
    trainings: list[Training]
    candidates: list[dict[str, Any]]


def read_run(folder: Path | str) -> Run:
    """Read a run's folder.

    Raises:
        UmedError: it is not there, holds neither an evaluation nor a training's log, or a file in it is damaged.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UmedError(f"{folder}: there is no such folder. Give the folder of a run, e.g. the --out of `umed demo`.")
    evaluated = [path.parent for path in (folder / "evaluation").glob("*/evaluation.json")]
    evaluations = {path.name: read_evaluation(path) for path in sorted(evaluated, key=_stage_rank)}
    trained = [folder, *sorted(path for path in (folder / "runs").glob("*") if path.is_dir())]
    trainings = [found for path in trained if (found := read_training(path)) is not None]
    trainings.sort(key=lambda training: ("", *STAGES).index(training.stage or ""))
    candidates = [line for path in trained for line in _lines(path / "candidates.jsonl")]
    if not evaluations and not trainings and not candidates:
        raise UmedError(
            f"{folder}: holds nothing to report: neither evaluation/STAGE/evaluation.json, nor trainer_state.json (of a "
            "training's output folder) here or in runs/NAME/. A training writes the latter at its end and with each checkpoint."
        )
    return Run(folder, evaluations, trainings, candidates)


def stage_label(stage: str) -> str:
    """What people call a stage."""
    return STAGES.get(stage, stage.replace("_", " "))


def _stage_rank(folder: Path) -> tuple[int, str]:
    known = list(STAGES)
    return (known.index(folder.name) if folder.name in known else len(known), folder.name)


def read_evaluation(folder: Path) -> Evaluation:
    """The cases and metrics that `umed_plugin.evaluation.grounded.Evaluation.save` has written into a folder."""
    summary = _json(folder / "evaluation.json")
    cases = []
    for number, line in enumerate(_lines(folder / "predictions.jsonl"), start=1):
        missing = _NEEDED - set(line)
        if missing:
            raise UmedError(
                f"{folder / 'predictions.jsonl'}:{number}: has no {', '.join(sorted(missing))}. Expected: what `umed evaluate "
                "--out` writes. Evaluate again."
            )
        cases.append(Case(**{name: value for name, value in line.items() if name in _CASE_FIELDS}))
    if not cases:
        raise UmedError(f"{folder / 'predictions.jsonl'}: holds no answers beside evaluation.json. Evaluate again.")
    checkpoint, template = summary.pop("checkpoint", ""), summary.pop("template", "")
    return Evaluation(checkpoint, template, cases, summary)


def read_training(folder: Path) -> Training | None:
    """The log of a training, finished or not; None where there is none."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    states += [path for path in [folder / "trainer_state.json"] if path.is_file()]
    if not states:
        return None
    state = _json(states[-1])
    said = _json(folder / "umed.json") if (folder / "umed.json").is_file() else {}
    stage = said.get("umed_stage")
    rows = [row for row in state.get("log_history", []) if "step" in row]
    return Training(
        folder.name, stage if stage in STAGES else None, rows, state.get("global_step", 0), state.get("max_steps", 0)
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UmedError(f"{file}: is not JSON ({error}). Was its writing cut off? Write it again.") from error
    if not isinstance(found, dict):
        raise UmedError(f"{file}: holds a {type(found).__name__}; expected an object.")
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file. A last line that a run is still writing is left out."""
    if not file.is_file():
        return
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UmedError(
                    f"{file}:{number}: is not JSON ({error}). Remove the line, or write it again."
                ) from error

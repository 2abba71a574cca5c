"""Finished results of a study: one small JSON a cell, with the scores of each question, so that pairs can be compared later.

What rows share, the questions, is a file beside them: ids, clusters and, where a class or a source was held out of training,
the group of each question.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any, Optional

from study_plan import Cell, Study, digest

from umed_plugin import files
from umed_plugin.evaluation.metrics.metric import Row
from umed_plugin.evaluation.results import Evaluation
from umed_plugin.training.made_with import made_with

GROUP = "training"  # of a question: whether what it shows was held out of training or seen there
# Metric -> its unit in the file: whole numbers are short.
UNITS = {"accuracy": 1, "mean_iou": 1000, "vision_relevance": 10000, "consistent_answers": 1}


class Rows:
    """The rows of one study.

    Args:
        study: as read.
        out: where they are, a folder for each study, and where new ones are written.
    """

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self._lock = threading.Lock()

    def digest(self, cell: Cell) -> str:
        """Of the settings that the cell's result depends on."""
        return digest(self.study, cell)

    def _folders(self) -> list[Path]:
        """Where rows are: the study's own folder, then those of other studies, of which equal settings count too."""
        own = self.out / self.study.name
        others = sorted(folder for folder in self.out.glob("*") if folder.is_dir() and folder != own)
        return [own, *others]

    def _row(self, cell: Cell) -> Optional[tuple[dict[str, Any], Path]]:
        """The row of a cell that its settings made, and its folder."""
        for folder in self._folders():
            file = folder / f"{cell.name}.json"
            row = files.read_object(file) if file.is_file() else None
            if row is not None and row["settings"] == self.digest(cell):
                return row, folder
        return None

    def read(self, cell: Cell) -> Optional[dict[str, Any]]:
        """The row of a cell; None if it is missing or was made under other settings."""
        found = self._row(cell)
        return None if found is None else found[0]

    def has(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return self.read(cell) is not None

    def outdated(self, cell: Cell) -> bool:
        """Whether there is a row of the cell that other settings made."""
        return self.read(cell) is None and (self.out / self.study.name / f"{cell.name}.json").is_file()

    def add(self, cell: Cell, about: dict[str, Any], evaluation: Path) -> None:
        """Write the row of a cell from its evaluation's folder."""
        rows = Evaluation.load(evaluation).rows()
        questions = {"ids": [row.id for row in rows], "clusters": [row.cluster for row in rows]}
        if any(GROUP in row.groups for row in rows):
            questions[GROUP] = [row.groups.get(GROUP, "") for row in rows]
        name = f"questions-{hashlib.sha256(repr(questions).encode()).hexdigest()[:10]}"
        scores = {metric: " ".join(_written(row, metric, unit) for row in rows) for metric, unit in UNITS.items()}
        entry = {"cell": vars(cell), **about, "questions": name, "scores": scores, "made_with": _made_with()}
        with self._lock:
            folder = self.out / self.study.name
            if not (folder / f"{name}.json").is_file():
                files.write_json(folder / f"{name}.json", questions, indent=None)
            files.write_json(folder / f"{cell.name}.json", entry)

    def scores(self, cell: Cell) -> Optional[list[Row]]:
        """The scored questions of a finished cell; None for others."""
        found = self._row(cell)
        if found is None:
            return None
        row, folder = found
        questions = files.read_object(folder / f"{row['questions']}.json")
        columns = {metric: text.split(" ") for metric, text in row["scores"].items()}
        groups = [{GROUP: group} for group in questions.get(GROUP, [])] or [{}] * len(questions["ids"])
        return [
            Row(name, cluster, {m: int(column[i]) / UNITS[m] for m, column in columns.items() if column[i] != "-"}, of)
            for i, (name, cluster, of) in enumerate(zip(questions["ids"], questions["clusters"], groups))
        ]


def _written(row: Row, metric: str, unit: int) -> str:
    return str(round(row.values[metric] * unit)) if metric in row.values else "-"


def _made_with() -> dict[str, Any]:
    made = made_with()
    versions = {name: made["versions"][name] for name in ("torch", "transformers", "umed-plugin")}
    return {"at": made["at"], "commit": made["commit"], **versions}

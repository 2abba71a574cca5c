"""Which files below a data root umed has written itself. They are no data, though a second run finds them where the first was.

Names and contents that umed gives to its files tell them. A folder that holds other files too, such as one with images and the
records that were built of them, keeps its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

# Begins the names of the files in which a build notes what it saw, and which picture it has rendered.
CHECKED = ".umed_checked"
_RENDERED_INTO = "images"
_RUN_FILE, _RUN_FILE_SAYS = "run.yaml", b"umed upgrade"
_DEMO_STUDIES, _DEMO_FOLDERS = "data/studies/annotations.csv", ("runs", "logs")
# What lies in the folder of an upgrade or a demo. A file of another name there is somebody's own.
_OF_A_RUN = {"data", "runs", "logs", "evaluation", "trial", "made", "checkpoint"}
_OF_A_RUN |= {"report.html", "summary.json", "before_after.png"}
_CHECK_PAGE, _CHECK_SHEETS = "check.html", ("sheet_", "augmented_")
_PSEUDO_BOXES_SHEET = ".pseudo_boxes.png"


class OwnFiles:
    """Tells the files that umed wrote below a folder, and counts those that are left out.

    Args:
        start: what a recipe names. If it is in the folder of a run, that run's files are meant, such as the demo's studies. If it
            is in a folder of rendered pictures, these are meant: somebody may have annotated them.

    Attributes:
        left_out: folder in which umed wrote -> number of files.
    """

    def __init__(self, start: Path) -> None:
        self._start = start
        self._runs: dict[Path, Optional[Path]] = {}
        self._builds: dict[Path, list[Path]] = {}
        self._rendered: dict[Path, frozenset[str]] = {}
        self._checked: dict[Path, bool] = {}
        self.left_out: Counter[Path] = Counter()

    def without(self, paths: Iterable[Path]) -> list[Path]:
        """The paths that umed did not write, in their order; the other files are counted.

        Where the folder of rendered pictures is named and holds nothing else, they are meant.
        """
        told = [(path, self.written_in(path)) for path in paths]
        built = self._start.parent
        if self._start.name == _RENDERED_INTO and all(folder == built or path.is_dir() for path, folder in told):
            return [path for path, _ in told]
        self.left_out.update(folder for path, folder in told if folder is not None and path.is_file())
        return [path for path, folder in told if folder is None]

    @property
    def count(self) -> int:
        """Number of files left out so far."""
        return sum(self.left_out.values())

    def written_in(self, path: Path) -> Optional[Path]:
        """The folder of the run or build that wrote a file; None for what umed did not write."""
        run = self.run_of(path)
        if run is not None or not path.name.endswith(".png"):
            return run
        folder = path.parent
        if path.name.endswith(_PSEUDO_BOXES_SHEET) and self._was_built(folder):
            return folder
        if path.name.startswith(_CHECK_SHEETS) and (folder / _CHECK_PAGE).is_file():
            return folder
        return next((built for built in self._builds_above(folder) if self._has_rendered(built, path)), None)

    def run_of(self, path: Path) -> Optional[Path]:
        """The folder of the upgrade or demo that wrote a file or folder, if that run is below the start."""
        run = self._run_above(path.parent)
        return run if run is not None and path.relative_to(run).parts[0] in _OF_A_RUN else None

    def is_run_alone(self, folder: Path) -> bool:
        """Whether a folder below the start is that of an upgrade or a demo, with nothing of somebody's own in it."""
        if self._run_above(folder) != folder:
            return False
        return all(path.name in _OF_A_RUN or path.name.startswith((".", _RUN_FILE)) for path in folder.iterdir())

    def _run_above(self, folder: Path) -> Optional[Path]:
        if folder not in self._runs:
            below = self._start in folder.parents
            above = self._run_above(folder.parent) if below else None
            self._runs[folder] = folder if below and above is None and _is_run(folder) else above
        return self._runs[folder]

    def _builds_above(self, folder: Path) -> list[Path]:
        """The folders whose rendered pictures may lie in this one and are not meant."""
        if folder not in self._builds:
            self._builds[folder] = [
                images.parent
                for images in (folder, *folder.parents)
                if images.name == _RENDERED_INTO and images not in self._start.parents
            ]
        return self._builds[folder]

    def _was_built(self, folder: Path) -> bool:
        if folder not in self._checked:
            self._checked[folder] = any(folder.glob(f"{CHECKED}*.jsonl"))
        return self._checked[folder]

    def _has_rendered(self, folder: Path, path: Path) -> bool:
        if folder not in self._rendered:
            self._rendered[folder] = _rendered_in(folder)
        rendered = self._rendered[folder]
        return bool(rendered) and path.relative_to(folder).as_posix() in rendered


def _is_run(folder: Path) -> bool:
    try:
        with (folder / _RUN_FILE).open("rb") as file:
            if _RUN_FILE_SAYS in file.readline():
                return True
    except OSError:
        pass
    return (folder / _DEMO_STUDIES).is_file() and all((folder / name).is_dir() for name in _DEMO_FOLDERS)


def _rendered_in(folder: Path) -> frozenset[str]:
    """The pictures that builds have rendered, relative to the folder. Lines that are damaged name none."""
    found = set()
    for file in folder.glob(f"{CHECKED}*.jsonl"):
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError:
            continue
        for line in lines:
            try:
                rendered = json.loads(line[line.index(b" ") :])["seen"][-1]
            except (ValueError, LookupError, TypeError):
                continue
            if isinstance(rendered, str) and rendered:
                found.add(rendered)
    return frozenset(found)

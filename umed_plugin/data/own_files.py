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
_DEMO_FOLDERS = ("data/studies", "runs", "logs")
_CHECK_PAGE, _CHECK_SHEETS = "check.html", ("sheet_", "augmented_")
_PSEUDO_BOXES_SHEET = ".pseudo_boxes.png"


class OwnFiles:
    """Tells the files that umed wrote below a folder, and counts those that are left out.

    Args:
        start: what a recipe names. If it is in the folder of a run, that run's files are meant, such as the demo's studies. If it
            is below the folder of rendered pictures, these are meant: somebody may have annotated them.

    Attributes:
        left_out: folder in which umed wrote -> number of files.
    """

    def __init__(self, start: Path) -> None:
        self._start = start
        self._runs: dict[Path, Optional[Path]] = {}
        self._rendered: dict[Path, frozenset[str]] = {}
        self._checked: dict[Path, bool] = {}
        self.left_out: Counter[Path] = Counter()

    def without(self, paths: Iterable[Path]) -> list[Path]:
        """The paths that umed did not write, in their order; the other files are counted."""
        kept = []
        for path in paths:
            folder = self.written_in(path)
            if folder is None:
                kept.append(path)
            elif path.is_file():
                self.left_out[folder] += 1
        return kept

    @property
    def count(self) -> int:
        """Number of files left out so far."""
        return sum(self.left_out.values())

    def written_in(self, path: Path) -> Optional[Path]:
        """The folder of the run or build that wrote a file; None for what umed did not write."""
        folder = path.parent
        run = self.run_of(folder)
        if run is not None:
            return run
        if not path.name.endswith(".png"):
            return None
        if path.name.endswith(_PSEUDO_BOXES_SHEET) and self._was_built(folder):
            return folder
        if path.name.startswith(_CHECK_SHEETS) and (folder / _CHECK_PAGE).is_file():
            return folder
        for built in (above.parent for above in path.parents if above.name == _RENDERED_INTO):
            if built / _RENDERED_INTO not in self._start.parents and self._has_rendered(built, path):
                return built
        return None

    def run_of(self, folder: Path) -> Optional[Path]:
        """The folder of an upgrade or a demo that this folder is or lies in, if that is below the start."""
        if folder not in self._runs:
            below = self._start in folder.parents
            above = self.run_of(folder.parent) if below else None
            self._runs[folder] = folder if below and above is None and _is_run(folder) else above
        return self._runs[folder]

    def _was_built(self, folder: Path) -> bool:
        if folder not in self._checked:
            self._checked[folder] = any(folder.glob(f"{CHECKED}*.jsonl"))
        return self._checked[folder]

    def _has_rendered(self, folder: Path, path: Path) -> bool:
        if folder not in self._rendered:
            self._rendered[folder] = _rendered_in(folder)
        return path.relative_to(folder).as_posix() in self._rendered[folder]


def _is_run(folder: Path) -> bool:
    try:
        with (folder / _RUN_FILE).open("rb") as file:
            if _RUN_FILE_SAYS in file.readline():
                return True
    except OSError:
        pass
    return all((folder / name).is_dir() for name in _DEMO_FOLDERS)


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

"""The studies of all open pages, each under an unguessable name. The oldest are evicted; all are removed at shutdown."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Optional

from umed_plugin.commands.serve.dialogue import Answer
from umed_plugin.commands.serve.studies import Study, View
from umed_plugin.commands.serve.uploads import Uploads
from umed_plugin.errors import UmedError

MOST_STUDIES = 16
MOST_ANSWERS = 40  # kept for each study, for their attention maps


class Case:
    """One upload of one page, from its first byte to the last question about it.

    Attributes:
        name: unguessable, because it grants access to the images.
        study: None until all files are uploaded.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.name = folder.name
        self.folder = folder
        self.uploads = Uploads(folder, most_bytes)
        self.study: Optional[Study] = None
        self._fault: Optional[UmedError] = None
        self.busy = threading.Lock()  # stores the files of one upload one after the other
        self._answers: OrderedDict[int, Answer] = OrderedDict()
        self._count = 0

    def opened(self) -> Study:
        """The study, read from the uploaded files at the first call.

        Raises:
            UmedError: none of the files can be shown.
        """
        with self.busy:
            if self._fault is not None:
                raise self._fault
            if self.study is None:
                try:
                    self.study = Study(self.folder, self.uploads.files, self.uploads.left_out)
                except UmedError as error:
                    self._fault = error
                    raise
            return self.study

    def key(self, view: View) -> tuple[str, View]:
        """The key of a picture in the model's caches."""
        return self.name, view

    def owns(self, key: tuple[str, View]) -> bool:
        """Whether a key belongs to one of this case's pictures."""
        return key[0] == self.name

    def keep(self, answer: Answer) -> int:
        """Keep an answer and return its number, for `answer`."""
        self._count += 1
        self._answers[self._count] = answer
        while len(self._answers) > MOST_ANSWERS:
            self._answers.popitem(last=False)
        return self._count

    def answer(self, number: int) -> Answer:
        """Return the answer with this number.

        Raises:
            UmedError: there is none, or newer answers have replaced it.
        """
        answer = self._answers.get(number)
        if answer is None:
            raise UmedError("This answer is not kept any longer. Ask again.")
        return answer


class Shelf:
    """All cases, in one temporary folder that only this user can read.

    Args:
        most_bytes: maximum size of one upload, unpacked.
    """

    def __init__(self, most_bytes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="umed-serve-"))
        self._most_bytes = most_bytes
        self._cases: OrderedDict[str, Case] = OrderedDict()
        self._changing = threading.Lock()

    def begin(self) -> Case:
        """Create an empty case. Above ``MOST_STUDIES`` the least recently used one is evicted."""
        folder = self.folder / secrets.token_urlsafe(16)
        folder.mkdir()
        case = Case(folder, self._most_bytes)
        with self._changing:
            self._cases[case.name] = case
            evicted = [self._cases.popitem(last=False)[1] for _ in range(len(self._cases) - MOST_STUDIES)]
        for old in evicted:
            shutil.rmtree(old.folder, ignore_errors=True)
        return case

    def find(self, name: str) -> Optional[Case]:
        """Return the case with this name, or None."""
        with self._changing:
            case = self._cases.get(name)
            if case is not None:
                self._cases.move_to_end(name)
            return case

    def forget(self, name: str) -> None:
        """Remove a case and its files."""
        with self._changing:
            case = self._cases.pop(name, None)
        if case is not None:
            shutil.rmtree(case.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""The studies of all open pages, each under an unguessable name and with an owner; all are removed at shutdown."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from umed_plugin.commands.serve.answer import Answer
from umed_plugin.commands.serve.studies import MOST_MEGAPIXELS, Study, limits_of
from umed_plugin.commands.serve.uploads import Uploads
from umed_plugin.commands.serve.views import View
from umed_plugin.errors import UmedError

MOST_STUDIES_OF_ONE = 16
MOST_STUDIES = 64
MOST_UPLOADS = 16  # of the largest size, together
IDLE_SECONDS = 2 * 3600
UPLOAD_SECONDS = 600  # without a request, after which an upload counts as given up
MOST_ANSWERS = 40  # kept for each study, for their attention maps


class Case:
    """One upload of one page, from its first byte to the last question about it.

    Attributes:
        name: unguessable, because it grants access to the images.
        owner: the person whose case it is.
        study: None until all files are uploaded.
        users: the number of requests that use it now.
        touched: when the last request ended, on the monotonic clock.
    """

    def __init__(self, folder: Path, most_bytes: int, owner: str, megapixels: int) -> None:
        self.name = folder.name
        self.folder = folder
        self.owner = owner
        self.users = 0
        self.touched = time.monotonic()
        self.uploads = Uploads(folder, most_bytes)
        self._limits = limits_of(megapixels)
        self.study: Optional[Study] = None
        self._fault: Optional[UmedError] = None
        self.busy = threading.Lock()  # stores the files of one upload one after the other
        self._answers: OrderedDict[int, tuple[int, Answer]] = OrderedDict()
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
                    self.study = Study(self.folder, self.uploads.files, self.uploads.left_out, self._limits)
                except UmedError as error:
                    self._fault = error
                    raise
            return self.study

    def idle(self) -> float:
        """Seconds since the last request."""
        return time.monotonic() - self.touched

    def is_free(self) -> bool:
        """Whether it may be removed: no request uses it, and it is not between two files of an upload."""
        uploading = self.study is None and self._fault is None and self.idle() < UPLOAD_SECONDS
        return not self.users and not uploading

    def key(self, view: View) -> tuple[str, View]:
        """The key of a picture in the model's caches."""
        return self.name, view

    def owns(self, key: tuple[str, View]) -> bool:
        """Whether a key belongs to one of this case's pictures."""
        return key[0] == self.name

    def keep(self, answer: Answer, model: int = 0) -> int:
        """Keep an answer of a model, by its index, and return the answer's number, for `answer`."""
        self._count += 1
        self._answers[self._count] = model, answer
        while len(self._answers) > MOST_ANSWERS:
            self._answers.popitem(last=False)
        return self._count

    def answer(self, number: int) -> tuple[int, Answer]:
        """The index of the model, and the answer with this number.

        Raises:
            UmedError: there is none, or newer answers have replaced it.
        """
        kept = self._answers.get(number)
        if kept is None:
            raise UmedError("This answer is not kept any longer. Ask again.")
        return kept


class Full(Exception):
    """There is no room for another study; the message says why and what to do."""


class Shelf:
    """All cases, in one temporary folder that only this user can read.

    Each case belongs to a person, that is a browser (see `umed_plugin.commands.serve.access`). A new case may replace the oldest
    one of the same person. It never replaces another person's, or one that is being uploaded or asked about.

    Args:
        most_bytes: maximum size of one upload, unpacked.
        megapixels: maximum size of one slice or picture.
    """

    def __init__(self, most_bytes: int, megapixels: int = MOST_MEGAPIXELS) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="umed-serve-"))
        self._most_bytes = most_bytes
        self._megapixels = megapixels
        self._cases: OrderedDict[str, Case] = OrderedDict()
        self._changing = threading.Lock()

    def begin(self, owner: str) -> Case:
        """Create an empty case for a person.

        Raises:
            Full: all of this person's cases are in use, or there is no room among those of all people.
        """
        with self._changing:
            removed = [case for case in self._cases.values() if case.is_free() and case.idle() > IDLE_SECONDS]
            kept = [case for case in self._cases.values() if case not in removed]
            own = [case for case in kept if case.owner == owner]
            if len(own) >= MOST_STUDIES_OF_ONE:
                free = [case for case in own if case.is_free()]
                if not free:
                    raise Full(f"You are uploading {len(own)} studies already. Wait until one of them is complete.")
                removed.append(free[0])
                kept.remove(free[0])
            self._check_room(kept)
            folder = self.folder / secrets.token_urlsafe(16)
            folder.mkdir()
            case = Case(folder, self._most_bytes, owner, self._megapixels)
            for old in removed:
                del self._cases[old.name]
            self._cases[case.name] = case
        for old in removed:
            shutil.rmtree(old.folder, ignore_errors=True)
        return case

    def _check_room(self, kept: list[Case]) -> None:
        held = sum(case.uploads.size for case in kept)
        if len(kept) >= MOST_STUDIES or held >= MOST_UPLOADS * self._most_bytes:
            raise Full(
                f"The server is full: it holds {len(kept)} studies of all its users, {held / 1e6:.0f} MB. Allowed: "
                f"{MOST_STUDIES} studies, {MOST_UPLOADS * self._most_bytes / 1e6:.0f} MB. Close pages that you do not need, or "
                f"try again later: a study is removed after {IDLE_SECONDS // 3600} hours without a request."
            )

    @contextmanager
    def using(self, name: str, owner: str) -> Iterator[Optional[Case]]:
        """The case with this name, which stays while it is used; None if there is none, or it is another person's."""
        with self._changing:
            case = self._cases.get(name)
            if case is not None and case.owner != owner:
                case = None
            if case is not None:
                self._cases.move_to_end(name)
                case.users += 1
        try:
            yield case
        finally:
            if case is not None:
                with self._changing:
                    case.users -= 1
                    case.touched = time.monotonic()

    def forget(self, name: str) -> None:
        """Remove a case and its files."""
        with self._changing:
            case = self._cases.pop(name, None)
        if case is not None:
            shutil.rmtree(case.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

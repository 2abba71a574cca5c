"""Check where a command is to write before its work begins, by the flag that says so."""

from __future__ import annotations

from pathlib import Path

from umed_plugin.errors import UsageError


def check_file(flag: str, file: Path | None, example: str) -> None:
    """Refuse a folder where a file is to be written, and a file where its folder should be.

    Args:
        flag: that names the file.
        file: as given; None: not given.
        example: name of such a file.

    Raises:
        UsageError: nothing can be written there.
    """
    if file is None:
        return
    if file.is_dir():
        raise UsageError(f"{flag} {file}: is a folder. Give a file, such as {file / example}")
    check_folder(flag, file, file.parent)


def check_folder(flag: str, given: Path | None, folder: Path | None = None) -> None:
    """Refuse a folder that cannot be made, because it or a folder above it is a file.

    Args:
        flag: that names the folder.
        given: as given; None: not given.
        folder: that has to be there; None: ``given`` itself.

    Raises:
        UsageError: nothing can be written there.
    """
    if given is None:
        return
    wanted = given if folder is None else folder
    for place in (wanted, *wanted.parents):
        if place.exists() and not place.is_dir():
            named = "is a file, where a folder is needed" if place == given else f"{place} is a file, and no folder"
            raise UsageError(f"{flag} {given}: {named}. Choose another {flag}.")

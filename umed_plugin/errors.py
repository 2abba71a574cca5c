"""What the person at the terminal is told: errors, warnings and notes.

Every message says what was found, where (file, record, flag), what is allowed and what to do. The command line prints a
`UmedError` without a traceback; anything else that is raised is a bug, of which it prints one line. Outside the tables that a
command prints, `note`, `warn` and `say` are the one way to speak to the user.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from umed_plugin.terminal.text import printable


class UmedError(Exception):
    """Something that the user can fix. The command line prints its message and exits with status 1.

    - `UmedError`: a file, a record, a checkpoint or a run is not as it must be.

      - `UsageError`: a flag or an argument is wrong.

    Example:
        >>> from umed_plugin import UmedError, load_records
        >>> try:
        ...     load_records("no_such_file.json")
        ... except UmedError as error:
        ...     print("cannot train:", error)
        cannot train: no_such_file.json: ...
    """


class UsageError(UmedError):
    """A flag or an argument is wrong. The command line prints the message and exits with status 2.

    Example:
        >>> from umed_plugin import UsageError, load_recipe
        >>> try:
        ...     load_recipe("brain_tumour_coco")
        ... except UsageError as error:
        ...     print(str(error)[:65])
        unknown recipe 'brain_tumour_coco'. Did you mean 'brain_tumor_coc
    """


def note(text: str) -> None:
    """Tell the user something that needs no action, as a line of standard output: ``umed: TEXT``."""
    say(f"umed: {text}")


def warn(text: str) -> None:
    """Tell the user something to look at, as a line of standard error: ``umed: warning: TEXT``."""
    say(f"umed: warning: {text}", stderr=True)


def fail(text: str) -> None:
    """Tell the user why the command ends, on standard error: ``umed: TEXT``."""
    say(f"umed: {text}", stderr=True)


def say(text: str, stderr: bool = False) -> None:
    """Print text, with control characters escaped: file names and file contents in it are not trusted.

    A line after the first that looks as if it came from `umed` itself is indented: it comes from a name that holds a newline.
    """
    lines = printable(text).split("\n")
    shown = [lines[0], *(f"  {line}" if line.startswith("umed") else line for line in lines[1:])]
    print("\n".join(shown), file=sys.stderr if stderr else sys.stdout, flush=True)


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``allowed``, or ``""`` when nothing is close.

    Words in another order come first: ``mistral_umed`` is ``umed_mistral``, and not ``mistral_direct``.
    """
    names = list(allowed)
    close = [name for name in names if name != found and _words(name) == _words(found)]
    close = close or difflib.get_close_matches(found, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _words(name: str) -> list[str]:
    return sorted(name.replace("-", "_").split("_"))


def unknown_name(kind: str, found: str, allowed: Iterable[str]) -> str:
    """One sentence for a name that does not exist: what was found, what is allowed, what was probably meant."""
    names = sorted(allowed)
    return f"unknown {kind} {found!r}.{did_you_mean(found, names)} Allowed: {', '.join(names) or 'none'}."

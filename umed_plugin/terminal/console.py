"""Rich consoles and standard streams on which untrusted text is shown and not obeyed.

Markup such as ``[red]`` is off: a file name may hold it. Style is given by ``style=`` or by a rich ``Text``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from umed_plugin.terminal.text import of_library, printable

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 250  # a wrapped name could not be searched for


def console(*, stderr: bool = False, wide_in_pipes: bool = False, **options: Any) -> Console:
    """A rich console that escapes control characters in everything that it prints.

    Args:
        stderr: print on standard error.
        wide_in_pipes: 250 columns if the output is no terminal.
        options: of rich's console.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would end the process with status 1, as if the command had failed.
            self.quiet = True
            raise BrokenPipeError

        def render_str(self, text: str, **how: Any) -> Any:
            # Before it is measured: a table's columns are as wide as what is shown.
            return super().render_str(printable(text), **how)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # A segment with `control` moves the cursor for a progress bar; rich makes it, and never from text.
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    options = {"markup": False, "emoji": False, "highlight": False, **options}
    made = SafeConsole(stderr=stderr, **options)
    if wide_in_pipes and not made.is_terminal:
        made = SafeConsole(stderr=stderr, **{**options, "width": _PIPE_WIDTH})
    return made


class _Guarded:
    """A text stream that escapes control characters in what libraries and `print` write."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream  # rich's consoles write to it directly: they need escape sequences

    def write(self, text: str) -> int:
        """Write; returns the number of characters of ``text``, as streams do."""
        self.rich_proxied_file.write(of_library(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Guard standard output and error, and let them show characters that their encoding lacks as escapes.

    Python has None for one that the shell has closed (``>&-``). What is written there is lost, as is meant.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        streams = [
            opened.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream
            for stream in before
        ]
        for stream in streams:
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.stdout, sys.stderr = _Guarded(streams[0]), _Guarded(streams[1])
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before

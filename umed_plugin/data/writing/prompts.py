"""The prompts: three text files that a person can edit (``--prompts FOLDER``), versioned into every record's provenance.

``write.txt`` asks for the diagnosis, ``reflect.txt`` for the ordered one, ``again.txt`` for a better one when an answer failed
its checks. Places such as ``{findings}`` are replaced, all else stays as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umed_plugin.errors import UmedError, unknown_name

SHIPPED = Path(__file__).parent / "prompt_files"
# Prompt -> places that it must have, and those that it may have.
_PLACES = {
    "write": (("findings",), ("words",)),
    "reflect": (("findings", "draft"), ("words",)),
    "again": (("faults",), ("findings", "words")),
}
_PLACE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Prompts:
    """The three texts.

    Attributes:
        texts: ``write``, ``reflect`` and ``again``.
        folder: where they were read.
    """

    texts: Mapping[str, str]
    folder: Path

    @classmethod
    def read(cls, folder: Path = SHIPPED) -> Prompts:
        """Read and check the prompts of a folder.

        Raises:
            UmedError: a file is missing or no UTF-8 text, or has no place for what the model must know; all faults at once.
        """
        faults: list[str] = []
        texts = {name: _read(folder / f"{name}.txt", name, faults) for name in _PLACES}
        if faults:
            raise UmedError("\n".join(faults) + f"\nBegin with a copy of {SHIPPED}")
        return cls(texts, folder)

    def fill(self, name: str, **words: str) -> str:
        """A prompt with its places filled; words that look like a place are left alone."""
        return _PLACE.sub(lambda place: words[place.group(1)], self.texts[name]).strip()

    @property
    def versions(self) -> dict[str, str]:
        """Prompt -> the first 16 digits of its file's SHA-256."""
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self.texts.items()}


def _read(file: Path, name: str, faults: list[str]) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        faults.append(f"{file}: cannot be read ({error.strerror}).")
        return ""
    except ValueError as error:
        faults.append(f"{file}: is not UTF-8 text ({error}).")
        return ""
    needed, allowed = _PLACES[name]
    found = _PLACE.findall(text)
    faults += [f"{file}: has no {{{place}}}, so the model would not see it." for place in needed if place not in found]
    faults += [
        f"{file}: {unknown_name('place', place, [*needed, *allowed])}"
        for place in dict.fromkeys(found)
        if place not in (*needed, *allowed)
    ]
    return text

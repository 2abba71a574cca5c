"""The prompts: three text files that users can replace (``--prompts FOLDER``); each record's provenance has their versions.

``write.txt`` requests the diagnosis, ``reflect.txt`` the ordered one, ``again.txt`` a better one when a reply failed its checks.
Placeholders such as ``{findings}`` are filled in; everything else is sent as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umed_plugin.errors import UmedError, unknown_name

SHIPPED = Path(__file__).parent / "prompt_files"
# Prompt -> placeholders that it must have, and those that it may have.
_PLACEHOLDERS = {
    "write": (("findings",), ("words",)),
    "reflect": (("findings", "draft"), ("words",)),
    "again": (("faults",), ("findings", "words")),
}
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Prompts:
    """The three prompts.

    Attributes:
        texts: by name: ``write``, ``reflect`` and ``again``.
        folder: where they were read.
    """

    texts: Mapping[str, str]
    folder: Path

    @classmethod
    def read(cls, folder: Path = SHIPPED) -> Prompts:
        """Read and check the prompts in a folder.

        Raises:
            UmedError: a file is missing, is not UTF-8 text, or lacks a placeholder that the model needs; all faults at once.
        """
        faults: list[str] = []
        texts = {name: _read(folder / f"{name}.txt", name, faults) for name in _PLACEHOLDERS}
        if faults:
            raise UmedError("\n".join(faults) + f"\nStart from a copy of {SHIPPED}")
        return cls(texts, folder)

    def fill(self, name: str, **values: str) -> str:
        """A prompt with its placeholders filled in. Values that look like a placeholder are not filled in again."""
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.texts[name]).strip()

    @property
    def versions(self) -> dict[str, str]:
        """Prompt -> the first 16 hex digits of its file's SHA-256."""
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self.texts.items()}


def _read(file: Path, name: str, faults: list[str]) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        faults.append(f"{file}: cannot be read ({error.strerror}).")
        return ""
    except ValueError as error:
        faults.append(f"{file}: is not UTF-8 text ({error}).")
        return ""
    required, optional = _PLACEHOLDERS[name]
    present = _PLACEHOLDER.findall(text)
    faults += [
        f"{file}: has no {{{placeholder}}}, so the model would not see it."
        for placeholder in required
        if placeholder not in present
    ]
    faults += [
        f"{file}: {unknown_name('placeholder', placeholder, [*required, *optional])}"
        for placeholder in dict.fromkeys(present)
        if placeholder not in (*required, *optional)
    ]
    return text

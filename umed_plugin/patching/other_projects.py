"""Which project the importable ``llava`` is of. Several share the import name, and the patches are written for one, LLaVA 1.2.

This module imports only the standard library, and no ``llava``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple, Optional

WANTED = "Use an environment with llava-torch 1.2.2.post1, and a working directory without another llava folder."
# A module that only one project has -> the project.
_PROJECTS = {
    "model.language_model.llava_qwen": "LLaVA-NeXT",
    "model.llava": "LLaVA(-Med) 1.0",
    "alignment": "LLaVA-RLHF",
}


class OtherProject(NamedTuple):
    """A ``llava`` that is not LLaVA 1.2.

    Attributes:
        name: what it looks like.
        folder: of the package.
    """

    name: str
    folder: Path

    def __str__(self) -> str:
        found = f"the llava that Python imports, {self.folder}, looks like {self.name}"
        return f"{found}; the patches are written for LLaVA 1.2. {WANTED}"


def folder_of_llava() -> Optional[Path]:
    """The folder of the package ``llava``; None if there is none."""
    spec = importlib.util.find_spec("llava")
    if spec is None:
        return None
    return Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or [""])))


def other_project() -> Optional[OtherProject]:
    """The project of ``llava`` if it is not LLaVA 1.2; None for LLaVA 1.2, and where no ``llava`` is found."""
    folder = folder_of_llava()
    if folder is None:
        return None
    for module, name in _PROJECTS.items():
        if (folder / f"{module.replace('.', '/')}.py").is_file():
            return OtherProject(name, folder)
    if not (folder / "train" / "train.py").is_file():
        return OtherProject("LLaVA-Med 1.5, or a copy without training code", folder)
    return None

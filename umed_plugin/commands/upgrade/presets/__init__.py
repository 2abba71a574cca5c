"""Presets of ``umed upgrade``: settings under which another system was trained, as a YAML that ``--config`` would take.

A preset sets a few keys of ``run.yaml``. What the run's own file or the command line sets counts more. A new preset is one YAML
in this folder, whose first comment line says what it is.
"""

from __future__ import annotations

from pathlib import Path

from umed_plugin.errors import UsageError, unknown_name


def presets() -> dict[str, str]:
    """Name of each preset -> what it is."""
    return {path.stem: _about(path) for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def preset_file(name: str) -> Path:
    """The file of a preset, by its name or its path.

    Raises:
        UsageError: there is none.
    """
    if name in presets():
        return Path(__file__).parent / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return Path(name)
    raise UsageError(unknown_name("preset", name, presets()) + " Or the path of a YAML file.")


def _about(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")

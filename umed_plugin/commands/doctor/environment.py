"""What is installed: which ``llava`` is imported, LLaVA's version pins, the accelerator, and the patches.

The caller passes the patches in, since only the launcher and the commands know them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from umed_plugin.commands.doctor.findings import ERROR, NOTE, WARNING, Finding, Kind
from umed_plugin.commands.machine import compute_bf16
from umed_plugin.patching import DISTRIBUTIONS, Patch, PatchMisfit, installed, misfit
from umed_plugin.patching.other_projects import WANTED, folder_of_llava, other_project

ENVIRONMENT = (
    Kind(
        "llava-missing", ERROR, "no llava can be imported",
        "Without LLaVA, umed can neither train nor evaluate.",
        "Install the plugin into the environment that LLaVA trains in, with llava-torch 1.2.2.post1.",
    ),
    Kind(
        "llava-broken", ERROR, "llava is installed, but its model cannot be imported",
        "llava.model swallows the error, so the missing class shows up much later.",
        "Fix what the error names. Run umed patches to see whether the library versions are supported.",
    ),
    Kind(
        "llava-other", WARNING, "the imported llava belongs to another project",
        "LLaVA-Med, LLaVA-NeXT and LLaVA-RLHF share the import name, and the patches are written for LLaVA 1.2.",
        WANTED,
    ),
    Kind(
        "pins", WARNING, "library versions that differ from LLaVA's pins, and patches that do not fit them",
        "Training refuses to start.",
        "Install LLaVA's pins, or the versions of constraints/current.txt, which the patches support.",
    ),
    Kind(
        "pins-known", NOTE, "library versions that differ from LLaVA's pins, supported by the patches",
        "LLaVA runs on them under umed-run; it may not run without the plugin.",
        "Nothing to do. Stock LLaVA on its pins loads checkpoints trained here.",
    ),
    Kind(
        "patch-misfit", ERROR, "a patch does not fit the installed code",
        "Training refuses to start.",
        "Run umed patches: it prints the code that was found and the versions that are supported.",
    ),
    Kind(
        "no-accelerator", NOTE, "no GPU",
        "Small models train on a CPU; 7B checkpoints do not.",
        "Nothing to do if this machine only examines files.",
    ),
    Kind(
        "no-flash-attention", NOTE, "a GPU without flash-attn",
        "train_mem.py requests it. Under umed-run, training uses another attention implementation and says so.",
        "Run pip install flash-attn --no-build-isolation, or continue without it.",
    ),
)  # fmt: skip
_KINDS = {kind.code: kind for kind in ENVIRONMENT}
_SHOWN = ("torch", "transformers", "peft", "accelerate", "deepspeed", "trl", "monai")


def _finding(code: str, found: str, where: str) -> Finding:
    kind = _KINDS[code]
    return Finding(code, kind.severity, found, where, kind.why, kind.remedy)


def examine_environment(patches: Sequence[Patch], prepare: Callable[[], None]) -> tuple[dict[str, Any], list[Finding]]:
    """Collect facts about the environment, and findings about its problems.

    Args:
        patches: all patches.
        prepare: applies what LLaVA needs before it can be imported on the installed libraries.

    Returns:
        Facts by name (a text, or a list of texts for ``accelerator``), and the findings.
    """
    facts: dict[str, Any] = {"python": f"{platform.python_version()} ({sys.executable})"}
    findings: list[Finding] = []
    findings += _llava(facts, prepare)
    misfits = [] if any(finding.severity == ERROR for finding in findings) else _patches(facts, patches)
    findings += _pins(facts, bool(misfits))
    findings += [_finding("patch-misfit", message.splitlines()[0], "umed patches") for message in misfits]
    findings += _accelerator(facts)
    return facts, findings


def _llava(facts: dict[str, Any], prepare: Callable[[], None]) -> Iterator[Finding]:
    folder = folder_of_llava()
    if folder is None:
        facts["llava"] = "not installed"
        yield _finding("llava-missing", "import llava finds no module", os.pathsep.join(sys.path))
        return
    distribution, version = installed("llava")
    facts["llava"] = f"{distribution} {version} ({folder})"
    other = other_project()
    if other is not None:
        yield _finding("llava-other", f"it looks like {other.name}", str(folder))
    try:
        prepare()
        importlib.import_module("llava.model.language_model.llava_llama")
        importlib.import_module("llava.model.language_model.llava_mistral")
    except PatchMisfit as error:
        yield _finding("patch-misfit", str(error).splitlines()[0], str(folder))
    except (ImportError, AttributeError, RuntimeError) as error:
        yield _finding("llava-broken", f"{type(error).__name__}: {error}", str(folder))


def _patches(facts: dict[str, Any], patches: Sequence[Patch]) -> list[str]:
    messages = [message for message in map(misfit, patches) if message]
    idle = sum(patch.not_needed() is not None for patch in patches)
    force = len(patches) - idle - len(messages)
    facts["patches"] = f"{force} in force under umed-run, {idle} not needed, {len(messages)} do not fit"
    return messages


def _pins(facts: dict[str, Any], misfit_found: bool) -> Iterator[Finding]:
    """Compare the installed versions with those that LLaVA's metadata requires."""
    for name in _SHOWN:
        if importlib.util.find_spec(name) is not None:
            facts[name] = installed(name)[1]
    deviations = _deviations()
    if deviations:
        yield _finding("pins" if misfit_found else "pins-known", ", ".join(deviations), "LLaVA's metadata")


def _deviations() -> list[str]:
    from packaging.requirements import Requirement

    for distribution in DISTRIBUTIONS["llava"]:
        try:
            wanted = importlib.metadata.requires(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        return [text for text in (_deviation(Requirement(line)) for line in wanted) if text]
    return []


def _deviation(requirement: Any) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"{requirement.name} is not installed (LLaVA: {requirement.specifier})" if requirement.specifier else None
        )
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} (LLaVA: {requirement.specifier})"


def _accelerator(facts: dict[str, Any]) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        facts["accelerator"] = "none"
        yield _finding("no-accelerator", "torch sees no GPU", f"torch {torch.__version__}")
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    half = "bf16" if compute_bf16() else "fp16 only"
    facts["accelerator"] = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices] + [half]
    if importlib.util.find_spec("flash_attn") is None:
        yield _finding("no-flash-attention", "flash_attn cannot be imported", sys.prefix)

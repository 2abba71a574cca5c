"""``umed doctor``: what a checkpoint is and which problems it will cause; without a checkpoint, examine the environment."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import say
from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.progress import add_quiet_flag, progress
from umed_plugin.terminal.text import printable_json

if TYPE_CHECKING:
    from umed_plugin.commands.doctor.examination import Diagnosis, Finding

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="identify a checkpoint and find its problems",
        description="Identify a checkpoint (family, template, image mode, tower) and report its problems, each with a remedy. No "
        "code in the checkpoint is run. Without CKPT: examine the environment, and whether LLaVA and the patches fit. Exit "
        "status: 0 without errors, 1 if an error was found, 2 on wrong usage.",
        epilog="examples:\n"
        "  umed doctor checkpoints/llava-mistral-umed\n"
        "  umed doctor checkpoints/llava-mistral-umed --fix\n"
        "  umed doctor",
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=Path, nargs="?", help="full checkpoint, LoRA folder or projector"
    )
    parser.add_argument(
        "--base", metavar="CKPT", type=Path, help="base of a LoRA folder or projector (default: the one that it names)"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="apply the safe fixes, to small JSON files only; each original is kept as FILE.before-doctor. Weights never change",
    )
    parser.add_argument(
        "--recipe",
        metavar="R",
        help="also print the memory that both stages of `umed upgrade CKPT --recipe R` need, and whether this GPU has it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the checkpoint or the environment. Return 1 if an error remains, else 0."""
    if args.checkpoint is None:
        return _environment(args)
    from umed_plugin.checkpoints.folder import ADAPTER, PROJECTOR, check_base
    from umed_plugin.commands.doctor.examination import diagnose, fix

    check_base(args.base, args.checkpoint, trained=(ADAPTER, PROJECTOR))
    if args.recipe is not None:
        _check_recipe(args.recipe)
    changes: list[str] = []
    with redirect_stdout(sys.stderr), progress("reading weights", "byte", quiet=args.json) as advance:

        def look() -> Diagnosis:
            return diagnose(args.checkpoint, args.base, advance)

        if args.fix:
            fix(lambda: look().findings, changes.append)
        diagnosis = look()
    if args.json:
        memory = {} if args.recipe is None else {"memory": _memory(args)}
        print(printable_json({**diagnosis.as_dict(), "changes": changes, **memory}))
    else:
        _print(diagnosis, changes, fixing=args.fix)
        if args.recipe is not None:
            for line in ("", *_memory(args)):
                say(line)
    return _status(diagnosis.findings)


def _check_recipe(recipe: str) -> None:
    """Refuse one that cannot be read, before a checkpoint's weights are."""
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import load_records

    if recipe.endswith(".json"):
        load_records(recipe)
    else:
        load_recipe(recipe)


def _memory(args: argparse.Namespace) -> list[str]:
    """The memory of the default plan, in lines."""
    from umed_plugin.checkpoints.adapter_folder import find_base
    from umed_plugin.checkpoints.folder import is_lora, read_config
    from umed_plugin.commands.machine import this_machine
    from umed_plugin.commands.memory import on_this_stack
    from umed_plugin.commands.memory_advice import DEFAULT_PLAN, memory_lines

    full = find_base(args.checkpoint, args.base) if is_lora(args.checkpoint) else args.checkpoint
    machine = this_machine()
    works = {name: on_this_stack(work, machine) for name, work in DEFAULT_PLAN.items()}
    return list(memory_lines(read_config(full), works, machine))


def _status(findings: Sequence[Finding]) -> int:
    from umed_plugin.commands.doctor.examination import ERROR

    return int(any(finding.severity == ERROR for finding in findings))


def _print(diagnosis: Diagnosis, changes: list[str], fixing: bool) -> None:
    from rich.text import Text

    console = make_console(wide_in_pipes=True)
    identity = diagnosis.identity
    lines = {
        "checkpoint": diagnosis.checkpoint,
        "family": f"{identity.family} (model_type {identity.model_type})",
        "kind": f"{identity.kind}" + (f", over {identity.base}" if identity.base else ""),
        "model": identity.language_model,
        "weights": f"{identity.parameters:,} values, "
        + ", ".join(f"{count} tensors of {dtype}" for dtype, count in identity.dtypes.items()),
        "template": f"{identity.template} in stock LLaVA, {identity.umed_template} in umed",
        "images": f"{identity.image_mode}; {identity.image_tokens} in the prompt",
        "tower": f"{identity.tower}; {identity.tower_inside} of its tensors in the checkpoint",
    }
    for name, text in lines.items():
        console.print(f"{name:<11}", style="bold", end="")
        console.print(text)
    for line in changes:
        console.print(Text.assemble(("fixed", "green"), f"      {line}"))
    if fixing and not changes:
        console.print("nothing to fix")
    print_findings(diagnosis.findings, console)
    fixable = sum(finding.fixable for finding in diagnosis.findings)
    if fixable and not fixing:
        console.print(f"{fixable} of these can be fixed: umed doctor {shlex.quote(str(diagnosis.checkpoint))} --fix")


def print_findings(findings: Sequence[Finding], console: Any) -> None:
    """Print one block per finding, then the number of each severity."""
    from rich.text import Text

    from umed_plugin.commands.doctor.examination import SEVERITIES

    for finding in findings:
        severity = (finding.severity, f"bold {COLOURS[finding.severity]}")
        console.print(Text.assemble("\n", severity, " ", (finding.code, "bold"), f": {finding.found}"))
        console.print(f"  where:  {finding.where}")
        console.print(f"  why:    {finding.why}")
        by_fix = " (--fix does this)" if finding.fixable else ""
        console.print(f"  remedy: {finding.remedy}{by_fix}")
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    totals = [f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items()]
    console.print(f"\n{', '.join(totals)}" if findings else "\nnothing found")


def _environment(args: argparse.Namespace) -> int:
    from umed_plugin.commands.doctor.environment import examine_environment
    from umed_plugin.errors import UsageError
    from umed_plugin.patches import ALL, prepare_llava

    if args.fix or args.base or args.recipe:
        raise UsageError("--fix, --base and --recipe need a checkpoint. Give one: umed doctor CKPT --fix")
    with redirect_stdout(sys.stderr):  # libraries print while they are imported
        facts, findings = examine_environment(ALL, prepare_llava)
    if args.json:
        print(printable_json({"environment": facts, "findings": [finding.as_dict() for finding in findings]}))
        return _status(findings)
    console = make_console(wide_in_pipes=True)
    for name, text in facts.items():
        console.print(f"{name:<13}", style="bold", end="")
        console.print(", ".join(text) if isinstance(text, list) else str(text))
    print_findings(findings, console)
    return _status(findings)

"""``umed upgrade``: from a checkpoint and a recipe to an upgraded checkpoint, in one resumable command."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.commands.numbers import seed
from umed_plugin.commands.outputs import check_folder
from umed_plugin.commands.signals import Ended
from umed_plugin.errors import UsageError, say, warn
from umed_plugin.terminal.console import console
from umed_plugin.terminal.progress import add_quiet_flag

if TYPE_CHECKING:
    from umed_plugin.commands.upgrade.plan import Step


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``upgrade``."""
    parser = subparsers.add_parser(
        "upgrade",
        help="run both stages, merge, evaluate before and after, and report, in one command",
        description="Upgrade a checkpoint with a recipe's data: build records, evaluate, train stage 1 and stage 2 through "
        "umed-run, merge and evaluate after each. DIR/run.yaml holds all settings; edit it and start again with --config. "
        "The same command continues a stopped run. The input is not changed. The result, DIR/checkpoint/NAME, has the input's "
        "layout: same files, tensor names, shapes and dtypes.",
        epilog="example:\n  umed upgrade checkpoints/llava-med-v1.5-mistral-7b --recipe mau --data-root mau --out runs/upgrade\n"
        "  umed upgrade --config runs/upgrade/run.yaml --set rewarding.candidates=16 --redo-changed",
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="folder of a checkpoint, full or LoRA")
    parser.add_argument(
        "--recipe", metavar="R", help="recipe (name or YAML file), or records that are built already (JSON)"
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of the recipe's data set")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run (default: umed-upgrade-CKPT)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="settings file (run.yaml); without --out, its folder is the run's folder",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="settings of another system to begin with, such as pfmvg (a name of --presets, or a YAML file); run.yaml, --config "
        "and the command line win over it",
    )
    parser.add_argument("--presets", action="store_true", help="list the presets and end")
    parser.add_argument("--base", metavar="CKPT", help="base of a LoRA checkpoint (default: the one its adapter names)")
    parser.add_argument("--method", choices=("lora", "full"), help="LoRA or full fine-tuning (default: lora)")
    parser.add_argument(
        "--processes", metavar="N", type=int, help="number of training processes (default: one per GPU)"
    )
    parser.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed configuration (default: no DeepSpeed)")
    parser.add_argument("--candidates", metavar="K", type=int, help="answers sampled per question (default: 8)")
    parser.add_argument("--rewards", metavar="LIST", help="comma-separated, as for --umed_rewards")
    parser.add_argument("--seed", metavar="N", type=seed, help="seed of wording, order and sampling (default: 0)")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any key of run.yaml, for example rewarding.steps=100; repeatable",
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="at the very end, put the result in CKPT's place and keep the old one beside it",
    )
    parser.add_argument(
        "--redo-changed",
        action="store_true",
        help="redo steps whose settings or inputs have changed, and all that depends on them",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and write nothing")
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Upgrade, or print the commands."""
    from umed_plugin.commands.upgrade.presets import presets
    from umed_plugin.commands.upgrade.run import Upgrade
    from umed_plugin.commands.upgrade.settings import RUN_FILE
    from umed_plugin.commands.upgrade.settings_file import read_settings
    from umed_plugin.commands.upgrade.training import what_is_trained

    if args.presets:
        for name, about in presets().items():
            say(f"{name}: {about}")
        return 0
    # User-defined rewards are found in the working folder, here as in the training processes.
    sys.path.append(os.getcwd())
    folder, file = _run_folder(args, RUN_FILE)
    check_folder("--out", folder)
    settings = read_settings(file, _changes(args), args.preset)
    upgrade = Upgrade(folder, settings, console(wide_in_pipes=True), args.redo_changed)
    if args.dry_run:
        upgrade.check()
        _print_commands(upgrade.steps)
        for name in upgrade.settings.stages:
            trained = what_is_trained(name, upgrade.settings)
            say(f"# {name.replace('_', ' ')} {trained}.")
        if (more := upgrade.plan.flags_if_val()) is not None:
            say(f"# The records are not built yet. If they have a split val, the run adds {more}.")
        for line in upgrade.memory():
            say(f"# {line}")
        return 0
    try:
        upgrade.run()
    except (KeyboardInterrupt, Ended):
        warn(f"{folder}: the upgrade is not finished. The same command continues it.")
        raise
    return 0


def _print_commands(steps: Sequence[Step]) -> None:
    """Print the commands as shell lines, to run from this folder."""
    from importlib.metadata import PackageNotFoundError, version

    from umed_plugin.commands.processes import importable

    try:
        version("umed-plugin")
    except PackageNotFoundError:  # a checkout that is not installed
        say(f"export PYTHONPATH={shlex.quote(importable()['PYTHONPATH'])}\n")
    for step in steps:
        say(f"# {step.title}\n{step.line()}\n")


def _run_folder(args: argparse.Namespace, run_file: str) -> tuple[Path, Path | None]:
    """(folder of the run, file to read settings from or None for the defaults)."""
    if args.config is not None:
        return args.out or args.config.resolve().parent, args.config
    if args.checkpoint is None and args.out is None:
        raise UsageError("give CKPT and --recipe, or --config FILE.\nSee umed upgrade --help")
    folder = args.out or Path(f"umed-upgrade-{Path(args.checkpoint).resolve().name}")
    if (folder / run_file).is_file():
        return folder, folder / run_file
    missing = [name for name, given in (("CKPT", args.checkpoint), ("--recipe", args.recipe)) if given is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} missing, and {folder} has no {run_file} yet.\nSee umed upgrade --help"
        )
    return folder, None


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value of every setting on the command line."""
    from umed_plugin.commands.upgrade.settings_file import recipe_path
    from umed_plugin.data.texts import parse_yaml

    here = Path.cwd()
    changes: dict[str, Any] = {}
    for key in ("checkpoint", "base", "data_root", "deepspeed"):
        if getattr(args, key) is not None:
            changes[key] = str(Path(getattr(args, key)).expanduser().absolute())
    if args.recipe is not None:
        changes["recipe"] = recipe_path(args.recipe, here)
    for key in ("method", "processes", "seed"):
        if getattr(args, key) is not None:
            changes[key] = getattr(args, key)
    if args.in_place:
        changes["in_place"] = True
    if args.candidates is not None:
        changes["rewarding.candidates"] = args.candidates
    if args.rewards is not None:
        changes["rewarding.rewards"] = args.rewards.split(",")
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: must be KEY=VALUE, such as rewarding.steps=100")
        changes[key] = parse_yaml(value, f"--set {key}")
    return changes

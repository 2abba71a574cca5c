"""``umed-run COMMAND...``: run an existing training command with the patches in every Python process that it starts.

How to run: ``umed-run bash finetune.sh`` with our flags in the script, ``umed-run torchrun --nproc_per_node 2 ...``,
``umed-run deepspeed ...``, or ``python -m umed_plugin.launch COMMAND...`` from a checkout. The command keeps its arguments. Our
settings are flags of the command (``--umed_stage ...``), because launchers pass PYTHONPATH on to other nodes, but not the rest
of the environment.

The command replaces this process, so signals, terminal and exit status are its own. Like a shell, umed-run exits with 127 if
there is no such command and 126 if it cannot be run; without a command it exits with 2.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from umed_plugin.errors import did_you_mean, say

SITE = Path(__file__).resolve().parent / "site"
USAGE = """usage: umed-run COMMAND [ARGUMENT...]

Run a LLaVA training command with umed-plugin in every Python process that it starts.

example:
  umed-run bash finetune.sh
  umed-run torchrun --nproc_per_node 2 llava/train/train_mem.py ... --umed_stage rewarding

The --umed_* flags are part of the training command, in the script that holds it. `python -m llava.train.train_mem --help`
under umed-run lists them.
Before you train, check with `umed patches` that the plugin fits the installed libraries.
"""
_SHELLS = ("bash", "sh", "dash", "zsh", "ksh")
_LONGEST_SCRIPT = 10**6
# $@, $*, $1, ${@:2}, and what hands them on without naming them.
_USES_ARGUMENTS = re.compile(r"\$\{?[@*1-9]|\b(source|getopts|shift|BASH_ARGV)\b|^\s*\.\s", re.MULTILINE)
_COMMON_COMMANDS = ("python", "python3", "bash", "sh", "torchrun", "deepspeed", "accelerate")


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with our site folder exactly once on PYTHONPATH, at the front."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(SITE)]
    return {**environment, "PYTHONPATH": os.pathsep.join([str(SITE), *entries])}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Replace this process with the command in ``argv``."""
    command = list(sys.argv[1:] if argv is None else argv)
    if command and command[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0)
    if command and command[0] == "--":
        command = command[1:]
    if not command or command[0].startswith("-"):
        fault = (
            f"{command[0]} is not a flag of umed-run. Flags come after the command."
            if command
            else "no command was given."
        )
        say(f"umed-run: error: {fault}\n\n{USAGE.rstrip()}", stderr=True)
        raise SystemExit(2)
    _run(command)


def _run(command: list[str]) -> NoReturn:
    program = shutil.which(command[0])
    if program is None:
        exists = os.path.isfile(command[0])
        reason = (
            "is not executable. Run it through its interpreter, for example `umed-run bash` or `umed-run python`"
            if exists
            else (
                f"no such command.{did_you_mean(command[0], _COMMON_COMMANDS)} It must be a program on PATH or a path to one"
            )
        )
        say(f"umed-run: error: {command[0]}: {reason}.", stderr=True)
        raise SystemExit(126 if exists else 127)
    if (lost := _lost_in_a_script(command, program)) is not None:
        say(f"umed-run: error: {lost}", stderr=True)
        raise SystemExit(2)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the shell has closed it: `>&-`
            stream.flush()
    try:
        os.execve(program, command, child_environment(os.environ))
    except OSError as error:
        say(f"umed-run: error: {program}: {error.strerror}. Run it through its interpreter.", stderr=True)
        raise SystemExit(126) from error


def _lost_in_a_script(command: Sequence[str], program: str) -> str | None:
    """Why our flags would be lost: they follow a shell script that uses none of its arguments, as LLaVA's own do."""
    words = list(command)
    if os.path.basename(program) in _SHELLS:
        while len(words) > 1 and words[1].startswith("-"):
            del words[1]
        script, given = Path(words[1] if len(words) > 1 else ""), words[2:]
    else:
        script, given = Path(program), words[1:]
    ours = next((word for word in given if word.startswith("--umed_")), None)
    if ours is None or not script.is_file():
        return None
    text = script.read_bytes()[:_LONGEST_SCRIPT].decode(errors="replace")
    is_shell = os.path.basename(program) in _SHELLS or re.match(r"#!.*sh\b", text)
    if not is_shell or _USES_ARGUMENTS.search(text):
        return None
    return (
        f'{script} passes no arguments on (it holds no "$@"), so {ours} would be lost. Write the --umed_* flags into its '
        'training command, or add "$@" at the end of that command.'
    )


if __name__ == "__main__":
    main()

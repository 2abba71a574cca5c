"""``umed recipe build`` by several processes: ``--workers`` on one machine, ``--shard I/N`` on many.

A shard reads and renders its share of the images, keeps what it saw beside ``--out``, and leaves a mark. Whoever finds the marks
of all shards goes on as a plain build does, which reads nothing anew. So the result is that of one process, with all its checks.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.commands.numbers import at_least_one
from umed_plugin.data.shards import Shard, parse_shard
from umed_plugin.errors import UmedError, UsageError, note, warn
from umed_plugin.files import parse_json
from umed_plugin.files.locks import HeldByAnotherError, locked

_FAULTS_SHOWN = 25
_OTHER_JOINED = "Another shard, which ended at the same time, writes"


def add_sharing_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``, ``--shard`` and ``--join``."""
    parser.add_argument(
        "--workers",
        type=at_least_one("--workers"),
        metavar="N",
        help="processes that read images (default: one for each CPU, at most 8, and 1 for few images); the result is the same",
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="read only this share of the images, such as 1/4; the shard that ends last writes the JSON",
    )
    share.add_argument("--join", action="store_true", help="write the JSON of shards that have all been read")


def is_whole(args: argparse.Namespace) -> bool:
    """Read this process's share, if it has one. True if every image was read, so that records can be built: see `joining`.

    Raises:
        UsageError: ``--join``, and a shard has not been read.
        UmedError: images of this share cannot be read.
    """
    if args.join:
        _check_joinable(args)
    if args.shard is None:
        return True
    _read_share(args)
    missing = _missing(args, args.shard.count)
    if args.shard in missing:
        # Whoever joined removed this mark too.
        note(f"shard {args.shard} is read. {_OTHER_JOINED} {args.out}.")
        return False
    if missing:
        note(
            f"shard {args.shard} is read. Still to be read: {', '.join(map(str, missing))}. The last one writes {args.out}; "
            "so does --join."
        )
        return False
    return True


@contextlib.contextmanager
def joining(args: argparse.Namespace) -> Iterator[bool]:
    """Hold ``--out`` while its records are written; False if they are written by another shard, which ended at the same time.

    The marks of the shards stay until `remove_marks`. So ``--join`` can repeat what failed or was stopped.

    Raises:
        UmedError: another process is writing it, and this one is no shard.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(args.out))
            is_ours = args.shard is None or not _missing(args, args.shard.count)
        except HeldByAnotherError:
            if args.shard is None:
                raise
            is_ours = False
        if not is_ours:
            note(f"shard {args.shard} is read. {_OTHER_JOINED} {args.out}.")
        yield is_ours


def _read_share(args: argparse.Namespace) -> None:
    from umed_plugin.data.build import read_shard
    from umed_plugin.data.recipes.recipe import load_recipe

    count, faults = read_shard(
        load_recipe(args.recipe),
        args.shard,
        out_dir=args.out.parent,
        split=args.split,
        data_root=args.data_root,
        against=args.against,
        progress=True,
        workers=args.workers,
    )
    if faults:
        more = f"\n  ... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        text = f"shard {args.shard}: {len(faults)} of {count} images cannot be read:\n  "
        text += "\n  ".join(faults[:_FAULTS_SHOWN]) + more
        if args.on_bad_image == "stop":
            raise UmedError(f"{text}\n--on-bad-image skip leaves bad images out.")
        warn(text)
    files.write_json(_mark(args, args.shard), _about(args))


def _about(args: argparse.Namespace) -> dict[str, Any]:
    """What a shard was read for: marks of another recipe or split do not count."""
    from umed_plugin.data.recipes.recipe import load_recipe

    return {"recipe_sha256": load_recipe(args.recipe).sha256, "split": args.split, "against": args.against}


def _mark(args: argparse.Namespace, shard: Shard) -> Path:
    out: Path = args.out
    return out.with_name(f".{out.name}.{shard.file_part}")


def _marks(args: argparse.Namespace) -> dict[Path, Shard]:
    """The marks of shards that were read for the same records."""
    about, found = _about(args), {}
    for file in args.out.parent.glob(f".{glob.escape(args.out.name)}.shard-*-of-*"):
        match = re.fullmatch(r"shard-(\d+)-of-(\d+)", file.name[len(args.out.name) + 2 :])
        try:
            if match is not None and parse_json(file.read_text(encoding="utf-8")) == about:
                found[file] = Shard(int(match[1]), int(match[2]))
        except (OSError, ValueError):
            continue  # not whole, or not a mark
    return found


def _missing(args: argparse.Namespace, count: int) -> list[Shard]:
    present = set(_marks(args).values())
    return [shard for shard in (Shard(index, count) for index in range(1, count + 1)) if shard not in present]


def _check_joinable(args: argparse.Namespace) -> None:
    counts = sorted({shard.count for shard in _marks(args).values()})
    if not counts:
        raise UsageError(
            f"--join: no shard has been read for {args.out} with this recipe, split and --against. Read each first: "
            "umed recipe build ... --shard 1/2"
        )
    if any(not _missing(args, count) for count in counts):
        return
    missing = ", ".join(str(shard) for shard in _missing(args, counts[-1]))
    raise UsageError(f"--join: shards {missing} have not been read. Read them with --shard, or build without --join.")


def remove_marks(args: argparse.Namespace) -> None:
    """Remove the marks of shards whose records have been written."""
    for file in args.out.parent.glob(f".{glob.escape(args.out.name)}.shard-*-of-*"):
        file.unlink(missing_ok=True)

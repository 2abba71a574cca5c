"""The flags of ``umed recipe build`` for diagnoses by a vision model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UsageError

if TYPE_CHECKING:
    from umed_plugin.commands.recipe.writer_settings import WriterSettings


def add_writer_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--writer``, and the flags that need ``--writer openai``."""
    group = parser.add_argument_group(
        "diagnoses by a vision model",
        "Pixels, class names and boxes leave the machine, but only with --writer openai. The key comes from OPENAI_API_KEY. "
        "Every reply is kept in a ledger: the same command again pays only for what is missing.",
    )
    group.add_argument(
        "--writer",
        default="templates",
        choices=("templates", "openai"),
        help="write diagnoses from templates on this machine, or by a model on an OpenAI-compatible server (default: templates)",
    )
    add = _Adder(group)
    _add_request_flags(add)
    _add_server_flags(add)
    _add_privacy_flags(add)
    add("--dry-run", action="store_true", help="send nothing and write no records; estimate requests, tokens and cost")
    parser.set_defaults(writer_flags=add.names)


def _add_request_flags(add: _Adder) -> None:
    """What is requested, and what a reply must fulfil."""
    add("--model", metavar="M", help="the model's name on the server")
    add(
        "--prompts",
        type=Path,
        metavar="FOLDER",
        help="folder with your write.txt, reflect.txt and again.txt (default: the shipped prompts)",
    )
    add("--request-options", metavar="JSON", help="further fields of each request, such as temperature and max_tokens")
    add("--crop", action="store_true", help="also send an enlarged view of each lesion")
    add("--language", choices=("en", "any"), help="language of the texts: en is checked, any is not (default: en)")
    add("--answer-words", metavar="MIN:MAX", help="number of words that a text may have (default: 15:150)")


def _add_server_flags(add: _Adder) -> None:
    """Where requests go, how fast, and for how much money."""
    add("--base-url", metavar="URL", help="the server's address, such as http://localhost:8000/v1 (default: OpenAI's)")
    add("--concurrency", type=int, metavar="N", help="number of images processed at the same time (default: 8)")
    add("--timeout", type=float, metavar="SECONDS", help="timeout of one attempt (default: 120)")
    add("--retries", type=int, metavar="N", help="further attempts after a network or server error (default: 5)")
    add(
        "--budget",
        metavar="AMOUNT",
        help="limit for all replies in the ledger: 2000000tokens or 5000requests; 20usd: for those of --model",
    )
    add("--prices", metavar="IN,OUT", help="US dollars per million prompt and completion tokens, such as 2.50,10")
    add("--ledger", type=Path, metavar="FILE", help="where replies are kept (default: FILE of --out, .ledger.jsonl)")
    add(
        "--batch",
        action="store_true",
        help="use the Batch API: replies within a day, at OpenAI for half the price (give --prices accordingly)",
    )


def _add_privacy_flags(add: _Adder) -> None:
    """Which images are not sent."""
    add(
        "--burnt-in",
        choices=("skip", "send"),
        help="leave out images that may have text burnt in (they are listed beside --out), or send them (default: skip)",
    )
    add("--leave-out", type=Path, metavar="FILE", help="file with ids of records that are never sent, one per line")


class _Adder:
    """Adds flags to a group and remembers their names."""

    def __init__(self, group: argparse._ArgumentGroup) -> None:
        self._group = group
        self.names: dict[str, str] = {}

    def __call__(self, flag: str, **keywords: Any) -> None:
        self.names[self._group.add_argument(flag, **keywords).dest] = flag


def read_writer_flags(args: argparse.Namespace) -> WriterSettings | None:
    """The writer's settings, or None for templates.

    Raises:
        UsageError: flags are wrong, or would have no effect.
        UmedError: a file that a flag names cannot be read.
    """
    values = {name: getattr(args, name) for name in args.writer_flags}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if args.writer == "templates":
        if given:
            flags = ", ".join(args.writer_flags[name] for name in given)
            raise UsageError(f"{flags}: no effect without --writer openai.")
        return None
    from umed_plugin.commands.recipe.writer_settings import WriterFlags, WriterSettings

    return WriterSettings.of(WriterFlags(out=args.out, **given))

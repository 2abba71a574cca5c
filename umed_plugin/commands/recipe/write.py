"""``umed recipe build --writer openai``: its flags, what is sent, and what is told while it runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.errors import UsageError

if TYPE_CHECKING:
    from umed_plugin.commands.recipe.writer_settings import WriterSettings
    from umed_plugin.data.records import Record
    from umed_plugin.data.writing.batched import BatchedWriter
    from umed_plugin.data.writing.decisions import Decision
    from umed_plugin.data.writing.steps import ImageTask
    from umed_plugin.data.writing.writer import DiagnosisWriter, Outcome
    from umed_plugin.remote.client import ModelClient
    from umed_plugin.remote.ledger import Ledger
    from umed_plugin.remote.replies import Answer, Reply

_SHOWN = 5
_log = logging.getLogger(__name__)


def add_writer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the writer; all but ``--writer`` go with ``--writer openai`` alone."""
    group = parser.add_argument_group(
        "diagnoses by a vision model",
        "Pixels, class names and boxes leave the machine, with --writer openai alone; the key comes from OPENAI_API_KEY. "
        "Every reply is kept in a ledger: the same command again pays only for what is missing.",
    )
    group.add_argument(
        "--writer",
        default="templates",
        choices=("templates", "openai"),
        help="who writes diagnoses: templates on this machine, or a model on an OpenAI-compatible server (default: templates)",
    )
    add = _Adder(group)
    add("--model", metavar="M", help="the model's name on the server")
    add("--base-url", metavar="URL", help="the server's address, such as http://localhost:8000/v1 (default: OpenAI's)")
    add(
        "--prompts",
        type=Path,
        metavar="FOLDER",
        help="your write.txt, reflect.txt and again.txt (default: the shipped)",
    )
    add("--request-options", metavar="JSON", help="further fields of each request, such as temperature and max_tokens")
    add("--crop", action="store_true", help="also send each lesion enlarged")
    add("--language", choices=("en", "any"), help="of the texts: en is checked, any is not (default: en)")
    add("--answer-words", metavar="FEWEST:MOST", help="words that a text may have (default: 15:150)")
    add("--concurrency", type=int, metavar="N", help="images that are asked about at the same time (default: 8)")
    add("--timeout", type=float, metavar="SECONDS", help="for one try (default: 120)")
    add("--retries", type=int, metavar="N", help="further tries after one that failed on the way (default: 5)")
    add("--budget", metavar="AMOUNT", help="of all replies in the ledger: 20usd, 2000000tokens or 5000requests")
    add("--prices", metavar="IN,OUT", help="US dollars for a million tokens read and written, such as 2.50,10")
    add("--ledger", type=Path, metavar="FILE", help="where replies are kept (default: FILE of --out, .ledger.jsonl)")
    add(
        "--burnt-in",
        choices=("skip", "send"),
        help="images that may have text burnt in, listed beside --out: leave them out, or send them (default: skip)",
    )
    add("--leave-out", type=Path, metavar="FILE", help="ids of records that are never sent, one a line")
    add(
        "--batch",
        action="store_true",
        help="ask by the Batch API: within a day, at OpenAI for half the price (give --prices so)",
    )
    add("--dry-run", action="store_true", help="send nothing and write no records; say what it would take")
    parser.add_argument(
        "--decisions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="what reviewers decided, as the pages of umed recipe review download it",
    )
    parser.set_defaults(writer_flags=add.names)


class _Adder:
    """Adds flags and remembers their names."""

    def __init__(self, group: argparse._ArgumentGroup) -> None:
        self._group = group
        self.names: dict[str, str] = {}

    def __call__(self, flag: str, **keywords: Any) -> None:
        self.names[self._group.add_argument(flag, **keywords).dest] = flag


def settings_of(args: argparse.Namespace) -> WriterSettings | None:
    """The writer's settings, or None for templates.

    Raises:
        UsageError: flags are wrong, or would have no effect.
    """
    given = {
        name: value for name in args.writer_flags if (value := getattr(args, name)) is not None and value is not False
    }
    if args.writer == "templates":
        if given:
            flags = ", ".join(args.writer_flags[name] for name in given)
            raise UsageError(f"{flags}: no effect without --writer openai.")
        return None
    from umed_plugin.commands.recipe.writer_settings import WriterFlags, WriterSettings

    return WriterSettings.of(WriterFlags(out=args.out, **given))


def decisions_of(args: argparse.Namespace) -> list[Decision]:
    """The reviewers' decisions; wrong files are told before an image is read."""
    from umed_plugin.data.writing.decisions import read_decisions

    if args.decisions and args.dry_run:
        raise UsageError("--decisions: no effect with --dry-run.")
    return read_decisions(args.decisions)


def may_be_sent(settings: WriterSettings, records: list[Record], folder: Path) -> list[Record]:
    """The records without those that the user's list or text in their pixels holds back; says which."""
    from umed_plugin.data.writing.burnt_in import divide, write_list

    divided = divide(records, folder, send=settings.send_burnt_in, left_out=settings.left_out)
    if divided.left_out:
        print(f"{divided.left_out} images are on the list of --leave-out and are not sent")
    if divided.unknown:
        shown = ", ".join(sorted(divided.unknown)[:_SHOWN])
        _log.warning("--leave-out names %d ids that no record has, such as: %s", len(divided.unknown), shown)
    if divided.suspected:
        what, where = "are sent, as --burnt-in send says", "see them with --burnt-in skip --dry-run"
        if not settings.send_burnt_in:
            what, where = "are left out", f"look at them: {settings.suspects} lists all"
            write_list(divided.suspected, settings.suspects, kept=settings.left_out)
        name, why = next(iter(divided.suspected.items()))
        _log.warning(
            "%d images may have text burnt into their pixels, perhaps a patient's name, and %s; %s. The first: %s (%s)",
            len(divided.suspected),
            what,
            where,
            name,
            why,
        )
    return divided.allowed


def write_diagnoses(
    settings: WriterSettings, records: list[Record], folder: Path
) -> tuple[list[Record], list[Record], bool]:
    """Have the model write the diagnoses of all records with lesions.

    Args:
        records: as built; their images lie below ``folder`` or have absolute paths.

    Returns:
        the records that are finished, those put aside, and whether every image has been answered.
    """
    from umed_plugin.data.writing.account import Account
    from umed_plugin.data.writing.batched import BatchedWriter
    from umed_plugin.data.writing.merge import with_texts
    from umed_plugin.data.writing.writer import DiagnosisWriter

    ledger, tasks = settings.open_ledger(), _tasks(settings, records, folder)
    writer: DiagnosisWriter | BatchedWriter
    account = Account(ledger, settings.budget, settings.prices)
    if settings.batch:
        writer = BatchedWriter(account)
        outcome = _run_in_batches(settings, writer, tasks)
    else:
        writer = DiagnosisWriter(account)
        outcome = _run_with_progress(settings, writer, tasks, ledger)
    finished, aside = with_texts(records, outcome, settings.model, settings.manner.prompts)
    _tell_outcome(settings, outcome, writer)
    return finished, aside, not outcome.missing


def _tasks(settings: WriterSettings, records: list[Record], folder: Path) -> list[ImageTask]:
    from umed_plugin.data.writing.steps import ImageTask

    return [ImageTask(record, folder, settings.manner) for record in records if record["objects"]["ref"]]


def with_decisions(records: list[Record], aside: list[Record], decisions: list[Decision], out: Path) -> list[Record]:
    """The records after review; those that still wait for a person go to a file beside ``out``, which goes when none does."""
    from umed_plugin.data.records import save_records
    from umed_plugin.data.writing.decisions import apply_decisions

    reviewed = apply_decisions(records, aside, decisions)
    waiting = out.with_name(f"{out.stem}.aside.json")
    if reviewed.aside:
        save_records(reviewed.aside, waiting)
        print(f"{len(reviewed.aside)} put aside, with what is wrong with them: {waiting}")
        print(f"Look at them with: umed recipe review {out}")
    elif waiting.is_file():
        waiting.unlink()
    if decisions:
        told = reviewed.counts
        print(f"reviewed: {told['accept']} accepted, {told['edit']} edited, {told['reject']} rejected")
        for name, why in (
            ("stale", "are about a text that has changed since"),
            ("unknown", "name no record of this build"),
        ):
            if told[name]:
                print(f"{told[name]} decisions {why}, and were not used")
    return reviewed.records


def _run_with_progress(
    settings: WriterSettings, writer: DiagnosisWriter, tasks: list[ImageTask], ledger: Ledger
) -> Outcome:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("diagnoses"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def told(outcome: Outcome) -> str:
        counts = ledger.counts
        paid = f"{counts['prompt_tokens'] + counts['completion_tokens']:,} tokens"
        if writer.account.spent_usd is not None:
            paid = f"${writer.account.spent_usd:.2f}"
        return f"{paid}, {writer.again} asked again, {len(outcome.aside)} aside, {len(outcome.missing)} failed"

    with bar:
        shown = bar.add_task("", total=len(tasks), told="")

        def on_progress(outcome: Outcome) -> None:
            settled = len(outcome.written) + len(outcome.aside) + len(outcome.missing)
            bar.update(shown, completed=settled, told=told(outcome))

        return writer.run(tasks, lambda keep: _connect(settings, keep), settings.concurrency, on_progress)


def _run_in_batches(settings: WriterSettings, writer: BatchedWriter, tasks: list[ImageTask]) -> Outcome:
    from rich.console import Console

    from umed_plugin.remote.batch_api import BatchClient

    with Console(stderr=True).status("diagnoses") as shown:

        def connect(keep: Callable[[str, Answer], None]) -> BatchClient:
            return BatchClient(
                settings.model,
                settings.ledger.with_name(f"{settings.ledger.stem}.batches.jsonl"),
                base_url=settings.base_url,
                options=settings.manner.options,
                timeout=settings.timeout,
                retries=settings.retries,
                on_answer=keep,
                on_wait=lambda state: shown.update(f"diagnoses: {state}"),
            )

        return writer.run(tasks, connect)


def _connect(settings: WriterSettings, keep: Callable[[str, Reply], None]) -> ModelClient:
    from umed_plugin.remote.client import ModelClient

    return ModelClient(
        settings.model,
        base_url=settings.base_url,
        options=settings.manner.options,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        on_reply=keep,
        last_wait=settings.timeout,
    )


def tell_forecast(settings: WriterSettings, records: list[Record], folder: Path) -> None:
    """Say what the diagnoses of these records would take; nothing is sent or written."""
    from umed_plugin.data.writing.estimate import forecast

    found = forecast(_tasks(settings, records, folder), settings.open_ledger())
    needs = found.needs
    print(f"{found.images} images with lesions, of which {found.settled} have all their replies in the ledger")
    price = ""
    if settings.prices is not None:
        price = f", ${found.usd(settings.prices):.2f}"
    print(
        f"still to send: about {needs['requests']} requests, {needs['prompt_tokens']:,} tokens read and "
        f"{needs['completion_tokens']:,} written{price}; at most {found.most_requests} requests, if every answer is asked "
        "for again as often as allowed"
    )
    basis = (
        "the mean of the replies in the ledger"
        if found.measured
        else "OpenAI's rule for pictures, 4 characters a token"
    )
    print(f"tokens: {basis}. Nothing was sent.")


def _tell_outcome(settings: WriterSettings, outcome: Outcome, writer: DiagnosisWriter | BatchedWriter) -> None:
    paid = "" if writer.account.spent_usd is None else f" for ${writer.account.spent_usd:.2f} in all"
    print(f"{len(outcome.written)} diagnoses written{paid}; every reply is in {settings.ledger}")
    if outcome.missing:
        print(f"{len(outcome.missing)} images have no diagnosis yet and are left out:")
        reasons: dict[str, list[str]] = {}
        for name, reason in outcome.missing.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in list(reasons.items())[:_SHOWN]:
            print(f"  {len(names)}, such as {names[0]}: {reason}")
        print("The same command asks for these alone" + (", with a larger --budget." if settings.budget else "."))

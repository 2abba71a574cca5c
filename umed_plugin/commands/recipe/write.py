"""``umed recipe build --writer openai``: which images are sent, the run of the writer, and what the user is told about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from umed_plugin.errors import note, warn
from umed_plugin.terminal.progress import progress

if TYPE_CHECKING:
    from umed_plugin.commands.recipe.writer_settings import WriterSettings
    from umed_plugin.data.records import Record
    from umed_plugin.data.writing.account import Account
    from umed_plugin.data.writing.burnt_in import Screening
    from umed_plugin.data.writing.steps import ImageTask
    from umed_plugin.data.writing.writer import DiagnosisWriter, Outcome
    from umed_plugin.remote.batch_api import BatchClient
    from umed_plugin.remote.client import ModelClient
    from umed_plugin.remote.replies import Reply, RequestResult

_SHOWN = 5


def screened(settings: WriterSettings, records: list[Record], folder: Path) -> list[Record]:
    """The records without those that the user's list or text in their pixels holds back; says which.

    Args:
        settings: of the writer.
        records: as built.
        folder: the folder that the records' images are relative to.
    """
    from umed_plugin.data.writing.burnt_in import screen

    screening = screen(records, folder, send=settings.send_burnt_in, left_out=settings.left_out)
    if screening.left_out:
        note(f"{screening.left_out} images are on the list of --leave-out and are not sent")
    if screening.unknown:
        shown = ", ".join(sorted(screening.unknown)[:_SHOWN])
        warn(f"--leave-out has {len(screening.unknown)} ids that no record has, such as: {shown}")
    if screening.suspected:
        _warn_of_text(settings, screening)
    return screening.allowed


def _warn_of_text(settings: WriterSettings, screening: Screening) -> None:
    from umed_plugin.data.writing.burnt_in import write_list

    action, advice = "are sent because of --burnt-in send", "To list them, use --burnt-in skip --dry-run"
    if not settings.send_burnt_in:
        action, advice = "are left out", f"Look at them: {settings.suspects} lists all"
        write_list(screening.suspected, settings.suspects, kept=settings.left_out)
    name, reason = next(iter(screening.suspected.items()))
    warn(
        f"{len(screening.suspected)} images may have text burnt into their pixels, such as a patient's name, and {action}. "
        f"{advice}. The first is {name} ({reason})."
    )


def write_diagnoses(
    settings: WriterSettings, records: list[Record], folder: Path
) -> tuple[list[Record], list[Record], bool]:
    """Have the model write the diagnoses of all records with lesions.

    Args:
        settings: of the writer.
        records: as built.
        folder: the folder that the records' images are relative to.

    Returns:
        the finished records, those set aside, and whether every image has an outcome.
    """
    from umed_plugin.data.writing.account import Account
    from umed_plugin.data.writing.merge import with_texts

    account = Account(settings.open_ledger(), settings.budget, settings.prices)
    run = _run_in_batches if settings.batch else _run_with_progress
    outcome = run(settings, account, _tasks(settings, records, folder))
    finished, set_aside = with_texts(records, outcome, settings.server.model, settings.diagnosis.prompts)
    _tell_outcome(settings, outcome, account)
    return finished, set_aside, not outcome.missing


def _tasks(settings: WriterSettings, records: list[Record], folder: Path) -> list[ImageTask]:
    from umed_plugin.data.writing.merge import needs_text
    from umed_plugin.data.writing.steps import ImageTask

    return [ImageTask(record, folder, settings.diagnosis) for record in records if needs_text(record)]


def _run_with_progress(settings: WriterSettings, account: Account, tasks: list[ImageTask]) -> Outcome:
    """Send requests one by one, with a progress bar."""
    from umed_plugin.data.writing.writer import DiagnosisWriter
    from umed_plugin.remote.client import ModelClient

    def connect(keep: Callable[[str, Reply], None]) -> ModelClient:
        # Replies in flight at the end are paid for, so the process waits for them as long as for any other.
        timeout = settings.server.timeout
        return ModelClient(settings.server, keep, concurrency=settings.concurrency, last_wait=timeout)

    writer = DiagnosisWriter(account)
    with progress("diagnoses", "image") as advance:

        def on_progress(outcome: Outcome) -> None:
            completed = len(outcome.written) + len(outcome.set_aside) + len(outcome.missing)
            advance(completed, len(tasks), _status(writer, outcome))

        return writer.run(tasks, connect, settings.concurrency, on_progress)


def _status(writer: DiagnosisWriter, outcome: Outcome) -> str:
    """Cost and counts, beside the progress bar."""
    counts = writer.account.ledger.counts
    cost = f"{counts['prompt_tokens'] + counts['completion_tokens']:,} tokens"
    if writer.account.spent_usd is not None:
        cost = f"${writer.account.spent_usd:.2f}"
    return f"{cost}, {writer.revisions} revised, {len(outcome.set_aside)} set aside, {len(outcome.missing)} failed"


def _run_in_batches(settings: WriterSettings, account: Account, tasks: list[ImageTask]) -> Outcome:
    """Send requests by the Batch API; the status line shows the batch that is waited for."""
    from umed_plugin.data.writing.batched import BatchedWriter
    from umed_plugin.remote.batch_api import BatchClient

    notes = settings.ledger.with_name(f"{settings.ledger.stem}.batches.jsonl")
    with progress("diagnoses", "image") as advance:
        advance(0, None, "looking for batches of earlier runs")

        def connect(keep: Callable[[str, RequestResult], None]) -> BatchClient:
            return BatchClient(settings.server, notes, keep, lambda state: advance(0, None, state))

        return BatchedWriter(account).run(tasks, connect)


def tell_forecast(settings: WriterSettings, records: list[Record], folder: Path) -> None:
    """Say what the diagnoses of these records would cost; nothing is sent or written."""
    from umed_plugin.data.writing.estimate import forecast

    estimate = forecast(_tasks(settings, records, folder), settings.open_ledger())
    needs = estimate.needs
    note(f"{estimate.images} images with lesions, of which {estimate.settled} have all their replies in the ledger")
    price = "" if settings.prices is None else f", ${estimate.usd(settings.prices):.2f}"
    note(
        f"still to send: about {needs['requests']} requests, {needs['prompt_tokens']:,} prompt tokens and "
        f"{needs['completion_tokens']:,} completion tokens{price}; at most {estimate.max_requests} requests, if every reply is "
        "revised as often as allowed"
    )
    basis = "OpenAI's rule for images and 4 characters per token"
    if estimate.measured:
        basis = "the mean of the replies in the ledger"
    note(f"the token counts are estimated from {basis}; nothing was sent")


def _tell_outcome(settings: WriterSettings, outcome: Outcome, account: Account) -> None:
    cost = "" if account.spent_usd is None else f" for ${account.spent_usd:.2f} in total"
    if cost and account.unpriced:
        cost += f" ({account.unpriced} replies of other models are not counted: --prices are those of one model)"
    note(f"{len(outcome.written)} diagnoses written{cost}; every reply is in {settings.ledger}")
    if not outcome.missing:
        return
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in outcome.missing.items():
        names_by_reason[reason].append(name)
    reasons = "".join(
        f"\n  {len(names)}, such as {names[0]}: {reason}" for reason, names in list(names_by_reason.items())[:_SHOWN]
    )
    note(f"{len(outcome.missing)} images have no diagnosis yet and are left out:{reasons}")
    note("run the same command again to request only these" + (", with a larger --budget" if settings.budget else ""))

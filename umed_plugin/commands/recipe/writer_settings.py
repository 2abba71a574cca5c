"""The flags of ``umed recipe build --writer openai``, checked together before an image is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.data.writing.burnt_in import read_list
from umed_plugin.data.writing.checks import DEFAULT_WORDS, Rules
from umed_plugin.data.writing.prompts import SHIPPED, Prompts
from umed_plugin.data.writing.steps import Manner
from umed_plugin.errors import UsageError
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger

# Some warmth, so that thousands of texts do not begin with the same words; an answer that is asked for again can differ.
DEFAULT_OPTIONS = '{"temperature": 0.7, "max_tokens": 500}'


@dataclass(frozen=True)
class WriterFlags:
    """The flags as given; ``None`` where not.

    Attributes:
        out: the JSON file that is built; the ledger lies beside it.
        others: as on the command line.
    """

    out: Path
    model: str | None = None
    base_url: str | None = None
    prompts: Path | None = None
    request_options: str | None = None
    crop: bool = False
    batch: bool = False
    language: str | None = None
    answer_words: str | None = None
    concurrency: int | None = None
    timeout: float | None = None
    retries: int | None = None
    budget: str | None = None
    prices: str | None = None
    ledger: Path | None = None
    burnt_in: str | None = None
    leave_out: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class WriterSettings:
    """What the flags mean.

    Attributes:
        manner: how images are asked about.
        model, base_url, concurrency, timeout, retries: of `umed_plugin.remote.client.ModelClient`.
        budget: amount and unit, or None.
        prices: US dollars for a million tokens read and written, or None.
        batch: whether the Batch API is used.
        ledger: file with all replies.
        suspects: file for the ids of images that may have text burnt in.
        send_burnt_in: whether these are sent all the same.
        left_out: ids that are never sent.
        dry_run: only say what it would take.
    """

    manner: Manner
    model: str
    base_url: str | None
    concurrency: int
    timeout: float
    retries: int
    budget: tuple[float, str] | None
    prices: tuple[float, float] | None
    batch: bool
    ledger: Path
    suspects: Path
    send_burnt_in: bool
    left_out: set[str]
    dry_run: bool

    @classmethod
    def of(cls, flags: WriterFlags, environment: Mapping[str, str] = os.environ) -> WriterSettings:
        """Check and read the flags.

        Raises:
            UsageError: what is wrong with them, all at once.
            UmedError: a prompt file is missing or wrong.
        """
        faults: list[str] = []
        asker = "--writer openai"
        if not flags.model:
            faults.append(f"{asker} needs --model, the model's name on the server.")
        if not flags.dry_run:
            faults += settings.package_fault(asker)
            faults += settings.server_faults(asker, "--base-url", flags.base_url, environment)
        budget = _parsed("--budget", flags.budget, settings.parse_budget, faults)
        prices = _parsed("--prices", flags.prices, settings.parse_prices, faults)
        if budget is not None and budget[1] == "usd" and prices is None:
            faults.append("--budget in usd needs --prices.")
        options = _options(flags.request_options or DEFAULT_OPTIONS, faults)
        words = _parsed("--answer-words", flags.answer_words, parse_words, faults) or DEFAULT_WORDS
        if flags.batch and flags.concurrency is not None:
            faults.append("--concurrency: no effect with --batch.")
        concurrency, retries, timeout = flags.concurrency, flags.retries, flags.timeout
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("timeout", timeout, 0.001),
        ):
            if value is not None and not value >= least:
                faults.append(f"--{name} {value}: must be at least {least}.")
        if faults:
            raise UsageError("\n".join(faults))
        manner = Manner(
            Prompts.read(flags.prompts or SHIPPED), options, Rules(words, flags.language or "en"), crop=flags.crop
        )
        return cls(
            manner,
            flags.model or "",
            flags.base_url,
            8 if concurrency is None else concurrency,
            120.0 if timeout is None else timeout,
            5 if retries is None else retries,
            budget,
            prices,
            flags.batch,
            flags.ledger or flags.out.with_name(f"{flags.out.stem}.ledger.jsonl"),
            flags.out.with_name(f"{flags.out.stem}.burnt_in.txt"),
            flags.burnt_in == "send",
            read_list(flags.leave_out) if flags.leave_out else set(),
            flags.dry_run,
        )

    def open_ledger(self) -> Ledger:
        """The ledger; a dry run reads it where there is one, and never makes it."""
        if self.dry_run and not self.ledger.exists():
            return Ledger(os.devnull, self.model, read_only=True)
        return Ledger(self.ledger, self.model, read_only=self.dry_run)


def parse_words(text: str) -> tuple[int, int]:
    """``15:150`` as fewest and most words; ValueError when it is none."""
    try:
        fewest, most = (int(part) for part in text.split(":"))
        fits = 0 < fewest < most
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("must be the fewest and the most words, such as 15:150")
    return fewest, most


def _parsed(flag: str, text: str | None, parse: Any, faults: list[str]) -> Any:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        faults.append(f"{flag} {text!r}: {error}.")
        return None


def _options(text: str, faults: list[str]) -> dict[str, Any]:
    try:
        options = settings.parse_options(text)
    except ValueError:
        faults.append(f"--request-options {text!r}: must be a JSON object such as '{DEFAULT_OPTIONS}'.")
        return {}
    taken = sorted(set(options) & set(settings.SET_BY_US))
    if taken:
        faults.append(f"--request-options sets {', '.join(taken)}, which is not for it to set. Leave it out.")
    return options

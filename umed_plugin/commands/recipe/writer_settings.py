"""What the flags of ``umed recipe build --writer openai`` mean; all are checked together before an image is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from umed_plugin.data.writing.burnt_in import read_list
from umed_plugin.data.writing.checks import DEFAULT_WORDS, TextRules
from umed_plugin.data.writing.prompts import SHIPPED, Prompts
from umed_plugin.data.writing.steps import DiagnosisSettings
from umed_plugin.errors import UsageError
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger

# A temperature above 0: thousands of texts should not begin with the same words, and a revision should differ.
DEFAULT_OPTIONS = '{"temperature": 0.7, "max_tokens": 500}'
_REQUESTER = "--writer openai"
Value = TypeVar("Value")


@dataclass(frozen=True)
class WriterFlags:
    """The flags as given; ``None`` where not given.

    Attributes:
        out: the JSON file to build; the ledger is beside it.
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
        diagnosis: how diagnoses are requested and checked.
        server: model, address, options, timeout and retries.
        concurrency: number of images processed at the same time.
        budget: amount and unit, or None.
        prices: US dollars per million prompt tokens and per million completion tokens, or None.
        batch: whether to use the Batch API.
        ledger: file with all replies.
        suspects: file for the ids of images that may have text burnt in.
        send_burnt_in: whether to send these images.
        left_out: ids of records that are never sent.
        dry_run: only estimate requests, tokens and cost.
    """

    diagnosis: DiagnosisSettings
    server: settings.ServerSettings
    concurrency: int
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
            UsageError: all faults of the flags at once.
            UmedError: a prompt file or the list of ``--leave-out`` is missing or wrong.
        """
        faults = [*_server_faults(flags, environment), *_number_faults(flags)]
        budget = _parsed("--budget", flags.budget, settings.parse_budget, faults)
        prices = _parsed("--prices", flags.prices, settings.parse_prices, faults)
        if budget is not None and budget[1] == "usd" and prices is None:
            faults.append("--budget in usd needs --prices.")
        options = _options(flags.request_options or DEFAULT_OPTIONS, faults)
        words = _parsed("--answer-words", flags.answer_words, parse_words, faults) or DEFAULT_WORDS
        if faults:
            raise UsageError("\n".join(faults))
        rules = TextRules(words, flags.language or "en")
        return cls(
            diagnosis=DiagnosisSettings(Prompts.read(flags.prompts or SHIPPED), options, rules, crop=flags.crop),
            server=_server(flags, options),
            concurrency=8 if flags.concurrency is None else flags.concurrency,
            budget=budget,
            prices=prices,
            batch=flags.batch,
            ledger=flags.ledger or flags.out.with_name(f"{flags.out.stem}.ledger.jsonl"),
            suspects=flags.out.with_name(f"{flags.out.stem}.burnt_in.txt"),
            send_burnt_in=flags.burnt_in == "send",
            left_out=read_list(flags.leave_out) if flags.leave_out else set(),
            dry_run=flags.dry_run,
        )

    def open_ledger(self) -> Ledger:
        """The ledger. A dry run reads it if it exists, and never creates it."""
        if self.dry_run and not self.ledger.exists():
            return Ledger(os.devnull, self.server.model, read_only=True)
        return Ledger(self.ledger, self.server.model, read_only=self.dry_run)


def _server(flags: WriterFlags, options: Mapping[str, Any]) -> settings.ServerSettings:
    defaults = settings.ServerSettings(flags.model or "")
    return settings.ServerSettings(
        model=defaults.model,
        base_url=flags.base_url,
        options=options,
        timeout=defaults.timeout if flags.timeout is None else flags.timeout,
        retries=defaults.retries if flags.retries is None else flags.retries,
    )


def _server_faults(flags: WriterFlags, environment: Mapping[str, str]) -> list[str]:
    """Faults of model, package, address and key. A dry run needs only the model."""
    faults = [] if flags.model else [f"{_REQUESTER} needs --model, the model's name on the server."]
    if not flags.dry_run:
        faults += settings.package_fault(_REQUESTER)
        faults += settings.server_faults(_REQUESTER, "--base-url", flags.base_url, environment)
    return faults


def _number_faults(flags: WriterFlags) -> list[str]:
    faults = []
    if flags.batch and flags.concurrency is not None:
        faults.append("--concurrency: no effect with --batch.")
    minima: dict[str, float] = {"concurrency": 1, "retries": 0, "timeout": 0.001}
    for name, minimum in minima.items():
        value = getattr(flags, name)
        if value is not None and not value >= minimum:
            faults.append(f"--{name} {value}: must be at least {minimum}.")
    return faults


def parse_words(text: str) -> tuple[int, int]:
    """``15:150`` as minimum and maximum number of words.

    Raises:
        ValueError: the text is not such a range.
    """
    try:
        fewest, most = (int(part) for part in text.split(":"))
        fits = 0 < fewest < most
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("must be the minimum and the maximum number of words, such as 15:150")
    return fewest, most


def _parsed(flag: str, text: str | None, parse: Callable[[str], Value], faults: list[str]) -> Value | None:
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
    reserved = sorted(set(options) & set(settings.SET_BY_US))
    if reserved:
        names = ", ".join(f"`{name}`" for name in reserved)
        faults.append(f"--request-options must not set {names}; the plugin sets it. Remove it.")
    return options

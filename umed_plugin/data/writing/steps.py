"""The next request about one image, decided only from the replies in the ledger.

Single requests, the Batch API and the cost estimate all follow the same path. As long as the ledger has the reply to a request,
the next request follows from it. So a run that was killed continues where it was, and a run that has all replies sends nothing.

The path: ``write`` until the draft is usable, then ``reflect`` on it until the finished text keeps all rules. A reply with faults
is requested again, at most `MAX_REVISIONS` times per image; then the image is set aside for a reviewer.

A request's key decides whether a reply that was paid for is found again. Nothing that enters it may change: the shipped prompts,
the sentences in `umed_plugin.data.writing.checks`, and the order of the values in `ImageTask._key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Union

from umed_plugin.data.images import drawing
from umed_plugin.data.records import Record, record_geometry
from umed_plugin.data.writing.checks import Findings, TextRules, draft_faults, in_our_dialect, reply_faults, text_faults
from umed_plugin.data.writing.prompts import Prompts
from umed_plugin.remote.ledger import Entry
from umed_plugin.remote.replies import Message

MAX_REVISIONS = 2


@dataclass(frozen=True)
class DiagnosisSettings:
    """How diagnoses are requested and checked.

    Attributes:
        prompts: the three prompts.
        options: further fields of each request, such as ``max_tokens``.
        rules: for finished texts.
        crop: whether each lesion is also sent enlarged.
    """

    prompts: Prompts
    options: Mapping[str, Any]
    rules: TextRules
    crop: bool = False


@dataclass(frozen=True)
class WriterRequest:
    """A request that has no reply yet.

    Attributes:
        key: hex digest of everything that decides the reply, except the model.
        stage: ``write`` or ``reflect``.
        revision: number of replies about this image that were rejected before.
        characters: length of all its texts.
        image_count: number of images in it.
        max_tokens: limit of the reply's tokens, if the request's options set one.
        messages: creates the messages; draws and encodes the images when called.
    """

    key: str
    stage: str
    revision: int
    characters: int
    image_count: int
    max_tokens: int | None
    messages: Callable[[], list[Message]]

    def facts(self, record: str) -> dict[str, Any]:
        """What the ledger notes about this request; ``record`` is the record's id."""
        return {"record": record, "stage": self.stage, "again": self.revision}


@dataclass(frozen=True)
class WrittenDiagnosis:
    """A finished text, the keys of the replies that led to it, and the model as the server names it."""

    text: str
    keys: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class SetAside:
    """No reply passed the checks: the last text (empty if there was none), its faults, the replies' keys, and the model."""

    text: str
    faults: tuple[str, ...]
    keys: tuple[str, ...]
    model: str


Step = Union[WriterRequest, WrittenDiagnosis, SetAside]


class ImageTask:
    """One record with lesions that needs a diagnosis.

    Args:
        record: as built. Its image is read when it is first needed.
        folder: the folder that the record's ``image`` is relative to.
        settings: how its diagnosis is requested and checked.

    Attributes:
        findings: what the model is told.
    """

    def __init__(self, record: Record, folder: Path, settings: DiagnosisSettings) -> None:
        self.record, self.settings = record, settings
        self.findings = Findings.of(record)
        self._file = folder / record["image"]

    def next_step(self, reply_to: Callable[[str], Entry | None]) -> Step:
        """The first request without a reply, or the result.

        Args:
            reply_to: looks a request's key up in the ledger.
        """
        stage, draft, keys, revision = "write", "", [], 0
        rejected: list[tuple[str, list[str]]] = []
        while True:
            request = self._request(stage, draft, rejected, revision)
            entry = reply_to(request.key)
            if entry is None:
                return request
            keys.append(request.key)
            model = entry.line.get("answered_by", "") or entry.model
            text = entry.reply or ""
            faults = self._faults(stage, entry)
            if not faults and stage == "reflect":
                return WrittenDiagnosis(in_our_dialect(text, self.findings), tuple(keys), model)
            if not faults:
                # The draft is usable. Revisions are counted over both stages, rejected texts per stage.
                stage, draft, rejected = "reflect", text, []
            elif revision == MAX_REVISIONS:
                return SetAside(text.strip(), tuple(faults), tuple(keys), model)
            else:
                revision += 1
                rejected = [*rejected, (text, faults)]

    def _faults(self, stage: str, entry: Entry) -> list[str]:
        """Faults of a reply: of any reply first, then of a draft or a finished text."""
        faults = reply_faults(entry.reply, str(entry.line.get("finish_reason", "stop")))
        if faults:
            return faults
        if stage == "write":
            return draft_faults(entry.reply or "", self.findings)
        return text_faults(entry.reply or "", self.findings, self.settings.rules)

    def _request(self, stage: str, draft: str, rejected: list[tuple[str, list[str]]], revision: int) -> WriterRequest:
        prompt = self._prompt(stage, draft)
        turns: list[Message] = []
        if rejected and rejected[-1][0]:  # only the last reply: it is the one to revise, and every token costs
            text, faults = rejected[-1]
            fault_list = "\n".join(f"- {fault}" for fault in faults)
            turns = [
                {"role": "assistant", "content": text},
                {"role": "user", "content": self._filled("again", faults=fault_list)},
            ]

        def messages() -> list[Message]:
            content: Any = prompt
            if stage == "write":
                images = [{"type": "image_url", "image_url": {"url": url}} for url in self._image_urls()]
                content = [{"type": "text", "text": prompt}, *images]
            return [{"role": "user", "content": content}, *turns]

        options = self.settings.options
        return WriterRequest(
            key=self._key(stage, prompt, turns, len(rejected)),
            stage=stage,
            revision=revision,
            characters=len(prompt) + sum(len(turn["content"]) for turn in turns),
            image_count=self.image_count if stage == "write" else 0,
            max_tokens=options.get("max_tokens", options.get("max_completion_tokens")),
            messages=messages,
        )

    def _key(self, stage: str, prompt: str, turns: list[Message], rejected_count: int) -> str:
        """Digest of everything that decides the reply. Changing it would pay for every diagnosis again."""
        parts = [prompt, turns, rejected_count, dict(self.settings.options)]
        if stage == "write":
            parts += [self._pixels, [list(box) for box in self.findings.boxes01], self.settings.crop]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _prompt(self, stage: str, draft: str) -> str:
        return self._filled("write") if stage == "write" else self._filled("reflect", draft=draft)

    def _filled(self, name: str, **values: str) -> str:
        fewest, most = self.settings.rules.words
        return self.settings.prompts.fill(name, findings=self.findings.lines(), words=f"{fewest} to {most}", **values)

    @property
    def image_count(self) -> int:
        """Number of images in the first request."""
        return 1 + (len(self.findings.boxes01) if self.settings.crop else 0)

    @property
    def reflection_characters(self) -> int:
        """Length of the second request without the draft."""
        return len(self._prompt("reflect", ""))

    @cached_property
    def _pixels(self) -> str:
        return drawing.pixel_digest(drawing.read_pixels(self._file))

    def _image_urls(self) -> list[str]:
        """The square with its frames, then each lesion enlarged if requested, as ``data:`` URLs."""
        square = drawing.square_of(drawing.read_pixels(self._file), record_geometry(self.record))
        images = [drawing.with_frames(square, self.findings.boxes01)]
        if self.settings.crop:
            images += [drawing.crop_of(square, box) for box in self.findings.boxes01]
        return [drawing.as_data_url(image) for image in images]

"""What to ask next about one image, told from the replies in the ledger alone.

Asking one by one, asking by the Batch API and estimating costs all walk the same path: while the ledger has the reply to a
question, the next one follows from it; so a run that was killed goes on where it was, and one that has all replies asks nothing.

The path: ``write`` until the answer can be used, then ``reflect`` on it until the finished text keeps to all rules. An answer
that does not is asked again, at most `MOST_AGAIN` times an image; then the image is put aside for a person.
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
from umed_plugin.data.writing.checks import Findings, Rules, draft_faults, in_our_dialect, reply_faults, text_faults
from umed_plugin.data.writing.prompts import Prompts
from umed_plugin.remote.ledger import Entry
from umed_plugin.remote.replies import Message

MOST_AGAIN = 2


@dataclass(frozen=True)
class Manner:
    """How images are asked about.

    Attributes:
        prompts: the three prompts.
        options: further fields of each request, such as ``max_tokens``.
        rules: that finished texts keep to.
        crop: whether each lesion is also shown enlarged.
    """

    prompts: Prompts
    options: Mapping[str, Any]
    rules: Rules
    crop: bool = False


@dataclass(frozen=True)
class Question:
    """A request that has no reply yet.

    Attributes:
        key: hex digest of all that decides the reply but the model.
        stage: ``write`` or ``reflect``.
        again: how often this image was asked again before.
        characters: of all texts in it.
        pictures: how many go along.
        most_written: tokens that the reply may have, where the request's options say so.
        messages: makes what is sent; draws and encodes the pictures when it is called.
    """

    key: str
    stage: str
    again: int
    characters: int
    pictures: int
    most_written: int | None
    messages: Callable[[], list[Message]]


@dataclass(frozen=True)
class Written:
    """The finished text, the keys of the replies that led to it, and the model as the server called it."""

    text: str
    keys: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class Aside:
    """No answer passed: the last text, if there was one, what is wrong with it, and the keys of the replies."""

    text: str
    faults: tuple[str, ...]
    keys: tuple[str, ...]
    model: str


Step = Union[Question, Written, Aside]


class ImageTask:
    """One record with lesions, for which a diagnosis is to be written.

    Args:
        record: as built; its image is read when it is first needed.
        folder: that the record's ``image`` is relative to.
        manner: how it is asked about.

    Attributes:
        findings: what the model is told.
    """

    def __init__(self, record: Record, folder: Path, manner: Manner) -> None:
        self.record, self.manner = record, manner
        self.findings = Findings.of(record)
        self._file = folder / record["image"]

    def next_step(self, reply_to: Callable[[str], Entry | None]) -> Step:
        """The first question without a reply, or how it ended.

        Args:
            reply_to: looks a question's key up in the ledger.
        """
        stage, draft, keys, again = "write", "", [], 0
        refused: list[tuple[str, list[str]]] = []
        model = ""
        while True:
            question = self._question(stage, draft, refused, again)
            entry = reply_to(question.key)
            if entry is None:
                return question
            keys.append(question.key)
            model = entry.line.get("answered_by", "") or entry.model
            text = entry.reply or ""
            faults = reply_faults(entry.reply, str(entry.line.get("finish_reason", "stop")))
            if not faults:
                faults = (
                    draft_faults(text, self.findings)
                    if stage == "write"
                    else text_faults(text, self.findings, self.manner.rules)
                )
            if not faults and stage == "reflect":
                return Written(in_our_dialect(text, self.findings), tuple(keys), model)
            if not faults:
                stage, draft, refused = "reflect", text, []
            elif again == MOST_AGAIN:
                return Aside(text.strip(), tuple(faults), tuple(keys), model)
            else:
                again += 1
                refused = [*refused, (text, faults)]

    def _question(self, stage: str, draft: str, refused: list[tuple[str, list[str]]], again: int) -> Question:
        asked = self._asked(stage, draft)
        turns: list[Message] = []
        if refused and refused[-1][0]:  # the last answer alone: it is the one to mend, and every token costs
            text, faults = refused[-1]
            listed = "\n".join(f"- {fault}" for fault in faults)
            turns = [
                {"role": "assistant", "content": text},
                {"role": "user", "content": self._filled("again", faults=listed)},
            ]
        what_decides = [asked, turns, len(refused), dict(self.manner.options)]
        if stage == "write":
            what_decides += [self._pixels, [list(box) for box in self.findings.boxes01], self.manner.crop]
        key = hashlib.sha256(json.dumps(what_decides, sort_keys=True).encode()).hexdigest()[:32]

        def messages() -> list[Message]:
            content: Any = asked
            if stage == "write":
                shown = [{"type": "image_url", "image_url": {"url": url}} for url in self._pictures()]
                content = [{"type": "text", "text": asked}, *shown]
            return [{"role": "user", "content": content}, *turns]

        characters = len(asked) + sum(len(turn["content"]) for turn in turns)
        most = self.manner.options.get("max_tokens", self.manner.options.get("max_completion_tokens"))
        return Question(key, stage, again, characters, self.picture_count if stage == "write" else 0, most, messages)

    def _asked(self, stage: str, draft: str) -> str:
        return self._filled("write") if stage == "write" else self._filled("reflect", draft=draft)

    def _filled(self, prompt: str, **words: str) -> str:
        fewest, most = self.manner.rules.words
        return self.manner.prompts.fill(prompt, findings=self.findings.lines(), words=f"{fewest} to {most}", **words)

    @property
    def picture_count(self) -> int:
        """Pictures that go along with the first request."""
        return 1 + (len(self.findings.boxes01) if self.manner.crop else 0)

    @property
    def reflection_characters(self) -> int:
        """Of the second request, without the draft."""
        return len(self._asked("reflect", ""))

    @cached_property
    def _pixels(self) -> str:
        return drawing.pixel_digest(drawing.read_pixels(self._file))

    def _pictures(self) -> list[str]:
        """The square with its frames, and each lesion enlarged if asked for, as ``data:`` addresses."""
        square = drawing.square_of(drawing.read_pixels(self._file), record_geometry(self.record))
        shown = [drawing.with_frames(square, self.findings.boxes01)]
        if self.manner.crop:
            shown += [drawing.crop_of(square, box) for box in self.findings.boxes01]
        return [drawing.as_data_url(each) for each in shown]

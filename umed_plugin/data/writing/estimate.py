"""What requests will take, before they are sent: from replies of the same kind where there are some, else from what is known.

Servers count tokens in their own ways, pictures above all. So as soon as the ledger has replies of a stage, their mean is taken;
before that, a token is four characters and a picture what OpenAI's GPT-4o takes for one in high detail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umed_plugin.data.writing.steps import MOST_AGAIN, ImageTask, Question
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Entry, Ledger

CHARACTERS_A_TOKEN = 4
PICTURE_TOKENS = 765  # 85 + 170 for each of the 4 tiles of 512 px that a square of 768 px has
TYPICAL_REPLY = 200  # tokens of a diagnosis of about 100 words, with its boxes
_COUNTED = ("prompt_tokens", "completion_tokens")


class TokenEstimate:
    """Tokens of a request by stage; learns from every reply.

    Args:
        entries: replies that are there already.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self._sums: dict[str, Counter[str]] = {}
        for entry in entries:
            usage = {name: entry.line[name] for name in _COUNTED if isinstance(entry.line.get(name), int)}
            self.learn(str(entry.line.get("stage")), usage)

    def learn(self, stage: str, usage: Mapping[str, int]) -> None:
        """Take a reply's usage into the mean of its stage."""
        if all(name in usage for name in _COUNTED):
            self._sums.setdefault(stage, Counter()).update({**usage, "requests": 1})

    def seen(self, stage: str) -> int:
        """How many replies of a stage the estimate rests on."""
        return self._sums.get(stage, Counter())["requests"]

    def of(self, question: Question) -> dict[str, int]:
        """``requests`` (1), ``prompt_tokens`` and ``completion_tokens`` that a question will probably take."""
        return self.of_stage(question.stage, question.characters, question.pictures, question.most_written)

    def of_stage(self, stage: str, characters: int, pictures: int, most_written: int | None) -> dict[str, int]:
        """The same from a question's sizes."""
        count = self.seen(stage)
        if count:
            return {"requests": 1, **{name: round(self._sums[stage][name] / count) for name in _COUNTED}}
        written = TYPICAL_REPLY if most_written is None else min(TYPICAL_REPLY, most_written)
        read = characters // CHARACTERS_A_TOKEN + pictures * PICTURE_TOKENS
        return {"requests": 1, "prompt_tokens": read, "completion_tokens": written}


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        images: with lesions.
        settled: of them have all their replies in the ledger.
        needs: ``requests``, ``prompt_tokens`` and ``completion_tokens`` of the others, if no answer is asked for again.
        most_requests: if every answer fails its checks as often as it can.
        measured: whether replies in the ledger stand behind it, not rules of thumb.
    """

    images: int
    settled: int
    needs: dict[str, int]
    most_requests: int
    measured: bool

    def usd(self, prices: tuple[float, float]) -> float:
        """US dollars for ``needs``."""
        return settings.cost(self.needs, prices)


def forecast(tasks: Sequence[ImageTask], ledger: Ledger) -> Forecast:
    """What is still to be asked about the images; sends nothing."""
    tokens = TokenEstimate(ledger.entries())
    needs: Counter[str] = Counter({"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})
    settled = most = 0
    for task in tasks:
        step = task.next_step(ledger.get)
        if not isinstance(step, Question):
            settled += 1
            continue
        needs.update(tokens.of(step))
        most += 1 + MOST_AGAIN - step.again
        if step.stage == "write":
            characters = task.reflection_characters + TYPICAL_REPLY * CHARACTERS_A_TOKEN
            needs.update(tokens.of_stage("reflect", characters, 0, step.most_written))
            most += 1
    return Forecast(len(tasks), settled, dict(needs), most, tokens.seen("write") > 0 and tokens.seen("reflect") > 0)

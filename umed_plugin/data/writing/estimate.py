"""Expected tokens of requests before they are sent.

Servers count tokens differently, above all those of images. Therefore the estimate is the mean of the replies of the same stage
as soon as the ledger has some. Before that, a token is four characters, and an image costs what OpenAI's GPT-4o charges for one
in high detail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from umed_plugin.data.writing.steps import MAX_REVISIONS, ImageTask, WriterRequest
from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Entry, Ledger

CHARACTERS_PER_TOKEN = 4
IMAGE_TOKENS = 765  # 85 + 170 for each of the 4 tiles of 512 px in a square of 768 px
TYPICAL_REPLY = 200  # tokens of a diagnosis of about 100 words, with its boxes
_COUNTED = ("prompt_tokens", "completion_tokens")


class TokenEstimate:
    """Expected tokens of a request by stage; updated with every reply.

    Args:
        entries: earlier replies.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._sums: dict[str, Counter[str]] = {}
        for entry in entries:
            usage = {name: entry.line[name] for name in _COUNTED if settings.is_count(entry.line.get(name))}
            self.learn(str(entry.line.get("stage")), usage)

    def learn(self, stage: str, usage: Mapping[str, int]) -> None:
        """Add a reply's usage to the mean of its stage."""
        if all(name in usage for name in _COUNTED):
            self._sums.setdefault(stage, Counter()).update({**usage, "requests": 1})

    def seen(self, stage: str) -> int:
        """Number of replies behind the estimate of a stage."""
        return self._sums.get(stage, Counter())["requests"]

    def of(self, request: WriterRequest) -> dict[str, int]:
        """Expected ``requests`` (1), ``prompt_tokens`` and ``completion_tokens`` of a request."""
        return self.of_stage(request.stage, request.characters, request.image_count, request.max_tokens)

    def of_stage(self, stage: str, characters: int, image_count: int, max_tokens: int | None) -> dict[str, int]:
        """The same as `of`, from a request's stage and sizes."""
        count = self.seen(stage)
        if count:
            return {"requests": 1, **{name: round(self._sums[stage][name] / count) for name in _COUNTED}}
        completion = TYPICAL_REPLY if max_tokens is None else min(TYPICAL_REPLY, max_tokens)
        prompt = characters // CHARACTERS_PER_TOKEN + image_count * IMAGE_TOKENS
        return {"requests": 1, "prompt_tokens": prompt, "completion_tokens": completion}


@dataclass(frozen=True)
class Forecast:
    """What a run would send.

    Attributes:
        images: number of images with lesions.
        settled: number of them that already have all their replies in the ledger.
        needs: expected ``requests``, ``prompt_tokens`` and ``completion_tokens`` of the others, if no revision is needed.
        max_requests: number of requests if every reply fails its checks as often as possible.
        measured: True if the estimate rests on replies in the ledger, False if on rules of thumb.
    """

    images: int
    settled: int
    needs: dict[str, int]
    max_requests: int
    measured: bool

    def usd(self, prices: tuple[float, float]) -> float:
        """US dollars for ``needs``."""
        return settings.cost(self.needs, prices)


def forecast(tasks: Sequence[ImageTask], ledger: Ledger) -> Forecast:
    """What is still to be requested for these images; sends nothing."""
    tokens = TokenEstimate(ledger.entries())
    needs: Counter[str] = Counter({"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})
    settled = max_requests = 0
    for task in tasks:
        step = task.next_step(ledger.get)
        if not isinstance(step, WriterRequest):
            settled += 1
            continue
        needs.update(tokens.of(step))
        max_requests += 1 + MAX_REVISIONS - step.revision
        if step.stage == "write":
            characters = task.reflection_characters + TYPICAL_REPLY * CHARACTERS_PER_TOKEN
            needs.update(tokens.of_stage("reflect", characters, 0, step.max_tokens))
            max_requests += 1
    measured = tokens.seen("write") > 0 and tokens.seen("reflect") > 0
    return Forecast(len(tasks), settled, dict(needs), max_requests, measured)

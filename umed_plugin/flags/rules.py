"""What a flag's field says of the flag: the stage that it acts in, what it needs, and the values that it allows.

Only the field itself states these (`umed_plugin.flags.groups`); `umed_plugin.flags.checks` and the help text read them.
Imports the standard library alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from umed_plugin.errors import unknown_name
from umed_plugin.remote import settings

STAGES = ("instruction_tuning", "rewarding")
TUNING, REWARDING = STAGES

# Kinds of folders that a flag can name.
EXISTING, CREATED = "existing", "created"

# What a run does when it is resumed with another value of a flag: see `umed_plugin.training.run_settings`.
FREE, SAID, ACCEPTED, RESTORED, FIXED = "free", "said", "accepted", "restored", "fixed"

# Every OpenAI-compatible server knows these; they keep a plain chat model's reply short and repeatable.
DEFAULT_JUDGE_OPTIONS = '{"temperature": 0, "max_tokens": 200}'


@dataclass(frozen=True)
class Needs:
    """What other flags must be for a flag to have an effect.

    Attributes:
        words: completes "has no effect without ...".
        met: whether a `UmedFlags` fulfils it.
    """

    words: str
    met: Callable[[Any], bool]

    def __and__(self, other: Needs) -> Needs:
        return Needs(f"{self.words}, and {other.words}", lambda flags: self.met(flags) and other.met(flags))


@dataclass(frozen=True)
class Rules:
    """The stage, the needs and the allowed values of one flag; None where nothing is asked. A value of None is always allowed.

    Attributes:
        stage: the one stage in which the flag acts; None for both.
        needs: what other flags must be for it to have an effect.
        choices: the only allowed values.
        above, least: lower bound of a number, exclusive or inclusive. Numbers must also be finite.
        below, most: upper bound, exclusive or inclusive.
        or_zero: 0 is allowed as well.
        pattern, form: regular expression that a text matches in full, and the same in words.
        parse: reads a value, or raises a ValueError that says what it must be.
        folder: `EXISTING`, or `CREATED` where it is missing.
        on_resume: whether a run can be resumed with another value.
        instead: what to do in the other stage, as a sentence.
    """

    stage: Optional[str] = None
    needs: Optional[Needs] = None
    choices: tuple[Any, ...] = ()
    above: Optional[float] = None
    least: Optional[float] = None
    below: Optional[float] = None
    most: Optional[float] = None
    or_zero: bool = False
    pattern: Optional[str] = None
    form: str = ""
    parse: Optional[Callable[[Any], Any]] = None
    folder: Optional[str] = None
    on_resume: str = ACCEPTED
    instead: str = ""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in which the flag acts."""
        return STAGES if self.stage is None else (self.stage,)

    def range_words(self) -> str:
        """The allowed numbers in words that complete "must be ..."; empty where there are no bounds."""
        if self.least is not None:
            return f"{self.least:g} or more" if self.most is None else f"from {self.least:g} to {self.most:g}"
        if self.above is None:
            return ""
        words = f"{'0, or ' if self.or_zero else ''}above {self.above:g}"
        if self.below is not None:
            return f"{words} and below {self.below:g}"
        return words if self.most is None else f"{words} and at most {self.most:g}"

    def help_words(self) -> str:
        """What the help text says of these rules, as sentences; a plain minimum such as 1 goes without saying."""
        plain = self.least is not None and self.most is None
        words = "" if plain or not self.range_words() else f" Must be {self.range_words()}."
        return words + (f" Needs {self.needs.words}." if self.needs is not None else "")

    def value_fault(self, name: str, value: Any) -> str | None:
        """What is wrong with the value of the flag ``name``, as a sentence."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"--{name}: {unknown_name('value', str(value), map(str, self.choices))}"
        if self.range_words() and not self._in_range(value):
            return f"--{name} {value}: must be {self.range_words()}."
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            return f"--{name} {value!r}: must be {self.form}."
        try:
            if self.parse is not None:
                self.parse(value)
        except ValueError as error:
            return f"--{name} {value!r}: {error}."
        return None

    def _in_range(self, value: float) -> bool:
        if self.or_zero and value == 0:
            return True
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )


CLINKD = "clinkd"


@dataclass(frozen=True)
class KeepWeights:
    """Weights of ``--umed_keep``: the loss is ``(cross_entropy + kl * KL) / divisor``.

    Attributes:
        kl: of the KL to the teacher, 0 or more.
        divisor: of the sum.
        temperature: at which both distributions are compared if ``--umed_distill_temperature`` is not given.
    """

    kl: float
    divisor: float = 1.0
    temperature: float = 1.0


def parse_keep(text: str) -> KeepWeights:
    """``--umed_keep``: a weight, or ``clinkd``, which is (cross-entropy + 0.5 KL) / 1.5 at temperature 0.5.

    Raises:
        ValueError: it is neither.
    """
    if text == CLINKD:
        return KeepWeights(0.5, 1.5, 0.5)
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"must be a weight of 0 or more, such as 0.1, or {CLINKD}")
    return KeepWeights(weight)


def must_sample_all(top_p: float) -> None:
    """Refuse ``--umed_top_p`` below 1.

    To be exact, the log-probabilities of policy, old policy and reference would need each token's nucleus, a mask over the
    vocabulary, from the pass that sampled it. A nucleus that a later pass computes anew may lack the token, by rounding alone.

    Raises:
        ValueError: it is not 1.
    """
    if top_p != 1:
        raise ValueError(
            "must be 1. Answers from a nucleus would be compared and trained under the whole distribution, which did not sample "
            "them, so the gradient would be biased. To sample less freely, lower --umed_temperature, which is exact. A run that "
            "was started with a nucleus goes on without this flag"
        )


def parse_judge_options(text: str) -> dict[str, Any]:
    """``--umed_judge_options`` as a dictionary.

    Raises:
        ValueError: it is not a JSON object, or sets a field that the plugin sets.
    """
    try:
        options = settings.parse_options(text)
    except ValueError as error:
        raise ValueError(f"must be a JSON object such as '{DEFAULT_JUDGE_OPTIONS}'") from error
    reserved = sorted(set(options) & set(settings.SET_BY_US))
    if reserved:
        raise ValueError(f"must not set {', '.join(reserved)}; the plugin sets it. Remove it")
    return options

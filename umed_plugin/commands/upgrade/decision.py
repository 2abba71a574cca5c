"""``rewarding: auto``: does stage 2 pay for these data? A short trial after stage 1 says so, on the held-out studies of ``val``.

Stage 2 is not started if one of these holds:

- **By heart**: answers sampled to the trial's training studies are better than greedy ones to held-out studies, by more than
  the limit of the guards (`umed_plugin.rewards.guard_limits`). All of them are right then, and there is nothing to learn from.
  It is judged once the guards' window is full.
- **No boxes**: the run has a reward for boxes, and no answer that the trial has sampled has a box.
- **No signal**: nearly all questions' answers have equal rewards. (GRPO alone; PPO learns from other questions' rewards too.)
- **No gain**: the trial has not raised the mean of IoU and accuracy of the held-out studies, or has lowered one of the two by an
  interval below 0.

It pays if none holds and the interval of that mean's gain lies above 0 (`umed_plugin.commands.upgrade.gain`). Between the two,
noise would decide: the trial **cannot tell**. Then ``rewarding.when_unsure`` says whether stage 2 is started, and the decision
says how many more held-out studies it takes to tell.

Without stage 2 the run ends with stage 1's checkpoint as its result. A trial is short, so it can miss a gain that comes late. The
decision says whether the first or the third could not be judged, because the trial's log lacks its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from umed_plugin.commands.upgrade.gain import FEWEST_TO_TELL, more_studies, paired_mean
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.tables import formatted
from umed_plugin.flags.names import BOX_REWARDS

PAYS, DOES_NOT_PAY, CANNOT_TELL = "pays", "does not pay", "cannot tell"

_JUDGED = {"mean_iou": "IoU", "accuracy": "accuracy"}
_MEAN = "mean"  # of these two
_MOST_STUDIES = 100_000  # a larger number of studies that it takes says no more than that the gain is all but 0
_SIGNAL = "groups_without_signal"
_MISSING = "guard/missing_boxes"  # whose limit is that there is no box at all


@dataclass(frozen=True)
class Decision:
    """Whether stage 2 is started, and why.

    Attributes:
        verdict: `PAYS`, `DOES_NOT_PAY` or `CANNOT_TELL`.
        starts: whether stage 2 is started. Where the trial cannot tell, ``rewarding.when_unsure`` has decided.
        reasons: sentences.
        differences: metric -> the trial's paired difference on the held-out studies, as `compare` gives it; ``mean`` is that of
            the mean of the others.
    """

    verdict: str
    starts: bool
    reasons: list[str]
    differences: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For ``summary.json``."""
        done = "started" if self.starts else "left out"
        return {"stage_2": done, "verdict": self.verdict, "because": self.reasons, "trial": self.differences}

    def with_reason(self, sentence: str) -> Decision:
        """The same decision with a further sentence, unless it has it already."""
        return self if sentence in self.reasons else replace(self, reasons=[*self.reasons, sentence])

    @classmethod
    def of_json(cls, written: Mapping[str, Any], start_if_unsure: bool = False) -> Decision:
        """From what `as_json` gave. Earlier versions wrote no verdict: what they decided stands."""
        started = written["stage_2"] == "started"
        verdict = written.get("verdict", PAYS if started else DOES_NOT_PAY)
        starts = start_if_unsure if verdict == CANNOT_TELL else started
        return cls(verdict, starts, list(written["because"]), dict(written["trial"]))

    def was_decided_in(self, written: Mapping[str, Any]) -> bool:
        """Whether an earlier version, which wrote no verdict, has decided by the same trial. A run may have gone on from that."""
        earlier = written["trial"]
        return "verdict" not in written and all(
            name in earlier and abs(earlier[name]["difference"] - own["difference"]) < 1e-9
            for name, own in self.differences.items()
            if name != _MEAN
        )


def decide(
    log: Sequence[Mapping[str, Any]], before: Evaluation, after: Evaluation, start_if_unsure: bool = False
) -> Decision:
    """Decide by a trial of stage 2.

    Args:
        log: of the trial's trainer (``log_history``), with the held-out guards.
        before, after: evaluations of the split val by stage 1's checkpoint and by the trial's.
        start_if_unsure: whether stage 2 is started where the trial cannot tell.
    """
    compared = compare(before, after)
    differences = {name: compared[name] for name in _JUDGED if compared.get(name, {}).get("difference") is not None}
    if differences:
        differences[_MEAN] = paired_mean([*differences], before.rows(), after.rows())
    against = [*_by_heart(log), *_no_boxes(log), *_no_signal(log), *_no_gain(differences)]
    if against:
        return Decision(DOES_NOT_PAY, False, [*against, *_not_judged(log)], differences)
    interval = differences[_MEAN]["ci95"]
    if interval is not None and interval[0] > 0:
        for_it = f"the trial has raised what held-out studies score: {_shown(differences)}."
        return Decision(PAYS, True, [for_it, *_not_judged(log)], differences)
    return Decision(CANNOT_TELL, start_if_unsure, [*_unsure(differences), *_not_judged(log)], differences)


def unused_labels(share: float) -> str:
    """What a run that ends with stage 1 has to say of its ``label_share``."""
    return (
        f"label_share {share:g}: stage 1 has trained on this share of the labelled studies, and nothing has trained on the "
        "others, or on what else is about their patients. A run with label_share null and rewarding: never trains stage 1 on all "
        "of them."
    )


def longer_stage_1(command: str) -> str:
    """What every decision says of the trial's limit: it compares stage 2 with nothing, and not with more of stage 1."""
    return (
        "More of stage 1 for the same time may bring more than stage 2 (docs/results.md). This trains stage 1 twice as long: "
        f"{command}"
    )


def _shown(differences: Mapping[str, Any]) -> str:
    """IoU, accuracy and, if there are both, their mean, each with its interval."""
    names = {**_JUDGED, **({_MEAN: "their mean"} if len(differences) > 2 else {})}
    shown = {names[name]: difference for name, difference in differences.items() if name in names}
    return ", ".join(f"{name} {_words(difference)}" for name, difference in shown.items())


def _words(difference: Mapping[str, Any]) -> str:
    # Digits until the gain has one that is not 0: "+0.000" beside "cannot tell" would look like no gain at all.
    size = abs(difference["difference"])
    digits = 3 if size >= 0.0005 or not size else 5
    return formatted(difference["difference"], difference["ci95"], f"+.{digits}f")


def _unsure(differences: Mapping[str, Any]) -> list[str]:
    """Sentences on a gain that may be noise: what was found, what it takes to tell, and which setting decides."""
    mean = differences[_MEAN]
    found = f"the trial cannot tell whether stage 2 raises what held-out studies score: {_shown(differences)}."
    more = more_studies(mean)
    if more is None:
        takes = (
            f"The {mean['n']} held-out studies of {mean['units']} patients or images give no interval. It takes at least "
            f"{FEWEST_TO_TELL} patients or images."
        )
    else:
        number = f"about {float(f'{more:.2g}'):,.0f}" if more <= _MOST_STUDIES else f"more than {_MOST_STUDIES:,}"
        takes = (
            f"The gain may be noise: its interval includes 0. If it stays as large, it takes {number} more held-out studies to "
            f"tell, beside the {mean['n']:,} that were answered."
        )
    asked = "rewarding.when_unsure decides then: leave_out (the default) ends with stage 1, start goes on with stage 2."
    return [found, takes, asked]


def _by_heart(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first values over a full window count: the policy is still all but what stage 1 has made.

    Those over fewer questions come earlier, but chance alone takes them over the limit.
    """
    from umed_plugin.rewards.guard_limits import crossed_limits
    from umed_plugin.rewards.guards import HELD_OUT_GUARDS, QUESTIONS_OVER_HELD_OUT, WINDOW

    known = {}
    for name in HELD_OUT_GUARDS:
        entries = [entry for entry in log if name in entry]
        if entries:
            # The first of the largest: a short trial may never fill the window. Logs of earlier releases lack the number; their
            # first entry counts, as it did.
            known[name] = max(entries, key=lambda entry: entry.get(QUESTIONS_OVER_HELD_OUT, WINDOW))[name]
    return [f"{name} is {known[name]:.3f}, {words}." for name, words in crossed_limits(known).items()]


def _no_boxes(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether no window of the guards has a box. What names alone may gain is not what rewards for boxes are for."""
    from umed_plugin.rewards.guard_limits import crossed_limits

    rewarded = any(f"reward/{name}" in entry for entry in log for name in BOX_REWARDS)
    windows = [entry for entry in log if _MISSING in entry]
    if not (rewarded and windows and all(_MISSING in crossed_limits(entry) for entry in windows)):
        return []
    return [
        "no answer that the trial has sampled has a box that can be read, so rewards for boxes have nothing to reinforce. Train "
        "stage 1 longer (instruction_tuning.epochs or steps), or raise rewarding.max_new_tokens if answers end before their box."
    ]


def _no_signal(log: Sequence[Mapping[str, Any]]) -> list[str]:
    from umed_plugin.rewards.guard_limits import crossed_limits, learns_within_groups

    values = [entry[_SIGNAL] for entry in log if _SIGNAL in entry and learns_within_groups(entry)]
    known = {_SIGNAL: sum(values) / len(values)} if values else {}
    return [f"{name} is {known[name]:.3f}, {words}." for name, words in crossed_limits(known).items()]


def _not_judged(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on the tests for which the trial's log has no numbers; PPO needs no signal within groups."""
    from umed_plugin.rewards.guard_limits import learns_within_groups
    from umed_plugin.rewards.guards import HELD_OUT_GUARDS

    lacking = []
    if not any(name in entry for entry in log for name in HELD_OUT_GUARDS):
        lacking.append(("the training studies are known by heart", " or ".join(HELD_OUT_GUARDS)))
    if not any(_SIGNAL in entry for entry in log if learns_within_groups(entry)) and all(
        map(learns_within_groups, log)
    ):
        lacking.append(("the answers to a question differ in their rewards", _SIGNAL))
    return [f"Not judged is whether {what}: the trial's log has no {names}." for what, names in lacking]


def _no_gain(differences: Mapping[str, Any]) -> list[str]:
    if not differences:
        return ["the held-out studies can be scored by neither IoU nor accuracy."]
    lost = [_JUDGED[name] for name, d in differences.items() if name in _JUDGED and d["ci95"] and d["ci95"][1] < 0]
    if differences[_MEAN]["difference"] > 0 and not lost:
        return []
    why = f"its {' and '.join(lost)} fell" if lost else "their mean has not risen"
    return [f"the trial has not raised what held-out studies score: {_shown(differences)}; {why}."]

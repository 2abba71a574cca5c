"""Life cycle of a run's rewards: create once, start asynchronous work early in each step, collect metrics.

The contract of a reward is in the docstring of :mod:`umed_plugin.rewards`; `umed_plugin.training.stopping` ends a run in which a
reward says to stop.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from umed_plugin.data import template_writer
from umed_plugin.data.image_files import evenly
from umed_plugin.errors import UmedError
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.names import SYMBOLIC
from umed_plugin.grounding.answer_types import PHRASE, REPORT
from umed_plugin.rewards.contract import REWARDS, Reward, call_reward, failing_as
from umed_plugin.rewards.judges.lexical import LOCAL_JUDGES, lexical_relevance
from umed_plugin.rewards.judges.relevance import JudgedRelevance
from umed_plugin.rewards.terms.localization_curriculum import LocalizationCurriculum
from umed_plugin.rewards.values import as_float, numbers_of, shown, values_of

# Of the records that `for_records` gets, unless the reward says otherwise: enough to know the wording of a data set of any size.
MOST_RECORDS = 2000


def make_rewards(
    flags: UmedFlags, output_dir: str | Path, records: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Reward]:
    """The rewards that ``--umed_rewards`` names, in its order.

    Args:
        flags: checked by :func:`umed_plugin.flags.checks.check`.
        output_dir: where a reward may keep files, such as a judge's ledger.
        records: of the training split. Rewards that have `for_records` get `MOST_RECORDS` of them at most, or as many as
            their `most_records` says.
    """
    rewards: dict[str, Reward] = {}
    for name in flags.reward_names():
        if name == "relevance":
            local = LOCAL_JUDGES.get(flags.umed_judge)
            rewards[name] = local or JudgedRelevance.of(flags, Path(output_dir))
        elif name.startswith(f"{SYMBOLIC}:"):
            rewards[name] = reward_of_run(REWARDS.get(SYMBOLIC)(name.partition(":")[2]), records)
        else:
            rewards[name] = reward_of_run(REWARDS.get(name), records)
    for reward in rewards.values():
        if isinstance(reward, LocalizationCurriculum):  # two questions of a call may have the same record
            reward.num_candidates = flags.umed_num_candidates
    return rewards


def reward_of_run(entry: Any, records: Sequence[Mapping[str, Any]] = ()) -> Reward:
    """What a run calls for an entry of `REWARDS`: an object of its own of a class, and what `for_records` makes of the records.

    Args:
        entry: a function, a callable object, or a class.
        records: of the training split; without any, `for_records` is not called.
    """
    reward: Any = entry() if isinstance(entry, type) else entry
    if not len(records) or not hasattr(reward, "for_records"):
        return reward
    most = getattr(reward, "most_records", MOST_RECORDS)
    return reward.for_records(records if most is None else evenly(records, most))


def remarks_on_records(rewards: Mapping[str, Reward], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about records from which the rewards teach nothing, or something else than they seem to.

    Args:
        rewards: of the run, by name.
        records: of the training split; `MOST_RECORDS` of them at most are looked at.

    Raises:
        UmedError: no reward applies to a kind of record, so nothing could be learnt from these records.
    """
    looked_at = list(evenly(records, MOST_RECORDS))
    return [*_what_is_unrewarded(rewards, looked_at), *_what_is_guessed(rewards, looked_at)]


def _what_is_unrewarded(rewards: Mapping[str, Reward], looked_at: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each kind of record that some reward does not apply to, a sentence that says so."""
    kinds = Counter(record.get("answer_type") for record in looked_at)
    sentences = []
    for kind in (PHRASE, REPORT):
        without = [name for name, reward in rewards.items() if not _applies(reward, {"answer_type": kind})]
        if not kinds[kind] or not without:
            continue
        share = f"{kinds[kind]} of {len(looked_at)} training records looked at are {kind}s"
        if len(without) == len(rewards):
            raise UmedError(
                f"{share}, and none of the rewards ({', '.join(rewards)}) applies to a {kind}: nothing would be learnt from "
                f"these. Use stage 1 for them, leave them out of the records, or add a reward that applies: "
                f"{', '.join(_that_apply(kind))}."
            )
        sentences.append(f"{share}; {', '.join(without)} {_verb(without)} not apply to them.")
    return sentences


def _what_is_guessed(rewards: Mapping[str, Reward], looked_at: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where relevance compares words with references that templates have worded at random; else nothing."""
    if rewards.get("relevance") is not lexical_relevance:
        return []
    worded = sum((record.get("provenance") or {}).get("writer") == template_writer.WRITER for record in looked_at)
    if not worded:
        return []
    return [
        f"{worded} of {len(looked_at)} training records looked at have references in random phrases, by the templates. "
        "--umed_judge lexical also rewards guessing the phrase; --umed_judge classes compares the classes' names alone."
    ]


def _applies(reward: Any, record: Mapping[str, Any]) -> bool:
    return bool(getattr(reward, "applies_to", lambda record: True)(record))


def _that_apply(kind: str) -> list[str]:
    """The shipped rewards that mean something for a kind of record."""
    return [name for name in sorted(REWARDS) if _applies(REWARDS.get(name), {"answer_type": kind})]


def _verb(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"


def start_rewards(
    rewards: Mapping[str, Reward], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> None:
    """Start the rewards that work in the background."""
    for name, reward in rewards.items():
        if hasattr(reward, "start"):
            with failing_as(name, reward, columns.get("record", ())):
                call_reward(reward.start, prompts, completions, columns)


def run_rewards(
    rewards: Mapping[str, Reward], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
) -> dict[str, list[float | None]]:
    """The values of each reward by name, one for each of the N candidates; None for a record to which it does not apply.

    Raises:
        UmedError: a reward returned something else than N finite numbers or None.
    """
    return {name: _values_of(name, reward, prompts, completions, columns) for name, reward in rewards.items()}


def _values_of(
    name: str,
    reward: Reward,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    with failing_as(name, reward, columns.get("record", ())):
        values = values_of(name, call_reward(reward, prompts, completions, columns), len(completions))
        if "record" in columns:
            values = [value if _applies(reward, record) else None for value, record in zip(values, columns["record"])]
    return numbers_of(name, values)


def advance_rewards(
    rewards: Mapping[str, Reward],
    gather: Callable[[list[Any]], list[Any]],
    agreed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Let the rewards that change over a run take in the last call of all processes.

    Args:
        rewards: by name, the same in every process.
        gather: turns this process's list into one of all processes', the same in each. All processes must call.
        agreed: makes a block in which a reward may fail in one process alone. All processes enter it.
    """
    changing: dict[str, Any] = {name: reward for name, reward in rewards.items() if hasattr(reward, "advance")}
    if not changing:
        return
    with agreed():
        own: dict[str, list[Any]] = {}
        for name, reward in changing.items():
            with failing_as(name, reward):
                own[name] = list(reward.for_all_processes())
    of_all = {name: gather(values) for name, values in own.items()}
    with agreed():
        for name, reward in changing.items():
            with failing_as(name, reward):
                reward.advance(of_all[name])


def end_rollout(
    rewards: Mapping[str, Reward], agreed: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Tell the rewards that a rollout is sampled whole; a rollout may take several samplings.

    Args:
        rewards: by name, the same in every process.
        agreed: as for `advance_rewards`.

    Raises:
        UmedError: a reward refuses to go on.
    """
    told: dict[str, Any] = {name: reward for name, reward in rewards.items() if hasattr(reward, "end_rollout")}
    if not told:
        return
    with agreed():
        for name, reward in told.items():
            with failing_as(name, reward):
                reward.end_rollout()


def reward_states(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """What a resumed run needs of the rewards that have a `state`, by name: as JSON gives it back, and not what they go on with.

    Raises:
        UmedError: a state is no JSON.
    """
    return {name: _state_of(name, reward) for name, reward in rewards.items() if hasattr(reward, "state")}


def _state_of(name: str, reward: Any) -> Any:
    with failing_as(name, reward):
        state = reward.state()
    try:
        return json.loads(json.dumps(state))
    except (RecursionError, TypeError, ValueError) as error:
        raise UmedError(
            f"reward {name!r}: state() returned what no JSON holds ({error}): {shown(state)}. Allowed: dictionaries with "
            "texts as keys, lists, texts, numbers, truth values and None."
        ) from None


def load_reward_states(rewards: Mapping[str, Reward], states: Mapping[str, Any]) -> list[str]:
    """Give the rewards the states that `reward_states` returned; returns the names of those that have none there.

    Raises:
        UmedError: a reward cannot read its state.
    """
    names = [name for name, reward in rewards.items() if hasattr(reward, "state")]
    for name in names:
        if name not in states:
            continue
        try:
            rewards[name].load_state(states[name])  # type: ignore[attr-defined]
        except (KeyError, TypeError, ValueError) as error:
            raise UmedError(
                f"reward {name!r}: its state in the checkpoint cannot be read ({type(error).__name__}: {error}). Resume from an "
                "earlier checkpoint."
            ) from error
    return [name for name in names if name not in states]


def reward_metric_names(rewards: Mapping[str, Reward]) -> list[str]:
    """All metrics that the rewards may log; the same in every process."""
    return [name for reward in rewards.values() for name in _names_of(reward)]


def collect_metrics(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """The rewards' metrics of their last call.

    Raises:
        UmedError: a reward logs a metric that its ``metric_names`` does not list, or one that is no number.
    """
    values: dict[str, float] = {}
    for name, reward in rewards.items():
        with failing_as(name, reward):
            metrics = _metrics_of(reward)
        if not isinstance(metrics, Mapping):
            raise UmedError(f"reward {name!r}: metrics() returned {shown(metrics)}. Allowed: a dictionary of numbers.")
        unknown = sorted(map(str, set(metrics) - set(_names_of(reward))))
        if unknown:
            raise UmedError(
                f"reward {name!r}: metrics() returned {', '.join(unknown)}, which its attribute `metric_names` does not list. "
                "Every process must know all names in advance: add them there."
            )
        for metric, value in metrics.items():
            number = as_float(value)
            if number is None:
                raise UmedError(
                    f"reward {name!r}: metrics() returned {shown(value)} for {metric}. Allowed: a number. Leave out a metric "
                    "that the last call did not measure."
                )
            values[metric] = number
    return values


def _names_of(reward: Reward) -> Sequence[str]:
    """``metric_names`` of a reward, or ``measures``, the older name."""
    return getattr(reward, "metric_names", getattr(reward, "measures", ()))


def _metrics_of(reward: Reward) -> Any:
    """``metrics()`` of a reward, or ``measured()``, the older name, where the reward announces its metrics by the older one.

    Empty for a reward that announces none. A method of such a name then serves another purpose and is not called.
    """
    if hasattr(reward, "metric_names"):
        names = ("metrics", "measured")
    elif hasattr(reward, "measures"):
        names = ("measured", "metrics")
    else:
        return {}
    readers = [read for read in (getattr(reward, name, None) for name in names) if callable(read)]
    return readers[0]() if readers else {}

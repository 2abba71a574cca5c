"""What stage 2 logs beside the loss: means since the last log over all ranks, guards with their warnings, sampled answers.

Logged are the metrics of `umed_plugin.rewards.guards`, those of the rewards and of the objective, and these. Every rank
gathers the same names, also a rank whose batches had nothing to measure; otherwise gathering would deadlock. A metric that no
rank could measure is left out.

- ``reward/<term>``, ``reward/total``: means over the candidates; the terms before normalisation and weights.
- ``weight/<term>``: its weight, if ``--umed_reward_weights`` lets it change over the run.
- ``groups_without_signal``: share of queries whose candidates all have the same reward, 0-1; GRPO learns nothing from them. Not
  logged for a single candidate per query.
- ``answer_tokens``: mean length of the candidates.
- ``answers_cut_off``: share of candidates that ``--umed_max_new_tokens`` ended, 0-1.
- ``answers_unrewarded`` (ppo): share of candidates for which all rewards were None, 0-1; they are not learnt from.

Shares and means of answers are of all that are sampled, on all ranks: an extra sampling of one question counts as one question.
Other metrics, also those of a user's own rewards, are means over batches or calls. With ``--umed_dynamic_sampling``, of each
rollout: ``groups_replaced``, the number of groups over all ranks, and ``extra_samplings``.

With ``--umed_rollout_server``, of each batch's tokens: ``importance_ratio`` and ``importance_ratio_max``, the probability
here over that on the server before truncation, its mean and its maximum; ``importance_truncated``, the share above
``--umed_importance_cap``; ``server_difference``, the mean distance of the log-probabilities in nats; and
``server_difference_without_adapter``, the same from the policy with its adapter off, in every fifth rollout.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.records import true_boxes
from umed_plugin.errors import warn
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.model.forward import Candidates
from umed_plugin.rewards import reward_metric_names
from umed_plugin.rewards.guard_limits import unscored
from umed_plugin.rewards.guards import (
    GUARDS,
    HELD_OUT_GUARDS,
    QUESTIONS_OVER_HELD_OUT,
    VISION_RELEVANCE_METRICS,
    Guards,
    vision_relevance_metrics,
)
from umed_plugin.training import dynamic_sampling, importance
from umed_plugin.training.advantages import has_signal
from umed_plugin.training.candidate_log import log_candidates
from umed_plugin.training.stopping import on_any_rank

_ALWAYS = (
    "reward/total",
    "policy_loss",
    "kl",
    "kl_per_answer",
    "kl_coef",
    "entropy",
    "clip_fraction",
    "groups_without_signal",
    "answer_tokens",
    "answers_cut_off",
)
_PPO = (
    "value_loss",
    "value_clip_fraction",
    "returns_mean",
    "advantage_std",
    "explained_variance",
    "answers_unrewarded",
)


def weight_of(reward: str) -> str:
    """The logged name of a reward's weight, if it changes over the run."""
    return f"weight/{reward}"


def metric_names(flags: UmedFlags, rewards: Mapping[str, Any]) -> list[str]:
    """All metrics that a run with these flags and rewards may log, in the order in which they are gathered."""
    names = [f"reward/{name}" for name in rewards]
    names += [weight_of(name) for name, weight in zip(rewards, flags.reward_schedule()) if weight.changes]
    names += [*reward_metric_names(rewards), *_ALWAYS, *GUARDS, *map(unscored, rewards), *VISION_RELEVANCE_METRICS]
    names += (*HELD_OUT_GUARDS, QUESTIONS_OVER_HELD_OUT) if flags.umed_val_every else ()
    names += ["feature_cache_hits"] if flags.umed_feature_cache is not None else []
    names += importance.METRICS if flags.umed_rollout_server is not None else ()
    names += dynamic_sampling.METRICS if flags.umed_dynamic_sampling else ()
    names += _PPO if flags.umed_algorithm == "ppo" else ()
    return names


def takes_metrics(logs: Mapping[str, float], state: Any) -> bool:
    """Whether a line of the log takes the metrics since the last one: that of a step, or of the end behind steps without a line.

    Args:
        logs: of the line; ``train_loss`` is in the last one of a run.
        state: of the trainer.
    """
    logged = max((line["step"] for line in state.log_history if "loss" in line), default=0)
    return "loss" in logs or ("train_loss" in logs and logged < state.global_step)


@dataclass(frozen=True)
class ScoredCandidates:
    """The N = Q*K candidates of a step, and what their rewards are made of.

    Attributes:
        texts: N answers.
        terms: reward name -> N raw values; None where a reward could not score.
        normalised: reward name -> [Q, K].
        weights: reward name -> weight of its normalised values.
        rewards: [Q, K], the weighted sum less what a cut-off answer loses.
    """

    texts: Sequence[str]
    terms: Mapping[str, Sequence[float | None]]
    normalised: Mapping[str, Tensor]
    weights: Mapping[str, float]
    rewards: Tensor


class StepMetrics:
    """Collects metrics step by step and returns their means.

    Args:
        trainer: a transformers trainer: its accelerator gathers, its callbacks show the candidates, its state has the step.
        flags: of the run.
        names: from `metric_names`; the same on every rank.
    """

    def __init__(self, trainer: Any, flags: UmedFlags, names: Sequence[str]) -> None:
        self._trainer, self._flags, self._names = trainer, flags, names
        # Metric -> sum of its values times what each counts, and the sum of these counts.
        self._sums: dict[str, tuple[float, float]] = {}
        self._guards = Guards()
        # Of each sampling since the last rollout: queries, each with what writes its candidates.
        self._held: list[list[tuple[int, Callable[..., None]]]] = []

    def add(self, metrics: Mapping[str, float], count: float = 1) -> None:
        """Add metrics of one batch, or means over ``count`` answers or queries."""
        for name, value in metrics.items():
            total, counts = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + count * value, counts + count

    def add_rewards(
        self,
        terms: Mapping[str, Sequence[float | None]],
        rewards: Tensor,
        candidates: Candidates,
        ended: Tensor,
    ) -> None:
        """Add the metrics of a rollout: reward terms by name, N values each, rewards [Q, K], and which answers end, bool [N]."""
        for name, column in terms.items():
            known = [value for value in column if value is not None]
            if known:
                self.add({f"reward/{name}": sum(known) / len(known)}, len(known))
        if rewards.shape[1] > 1:  # a single answer has no group
            self.add({"groups_without_signal": 1 - has_signal(rewards).float().mean().item()}, len(rewards))
        self.add(
            {
                "reward/total": rewards.mean().item(),
                "answer_tokens": candidates.mask.sum(dim=1).float().mean().item(),
                "answers_cut_off": 1 - ended.float().mean().item(),
            },
            rewards.numel(),
        )

    def held_out(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a validation to the guards."""
        self._guards.held_out(metrics)

    def add_guards(
        self,
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        terms: Mapping[str, Sequence[float | None]],
    ) -> None:
        """Show the candidates of each query to the guards; N texts, columns as a reward gets them, and N values of each term."""
        k = self._flags.umed_num_candidates
        records, geometries = columns["record"], columns["geometry"]
        scores = [score_answer(*answer) for answer in zip(texts, records, geometries)]
        for first in range(0, len(texts), k):
            group = slice(first, first + k)
            self._guards.add(texts[group], scores[group], records[group], geometries[group])
            self._guards.add_terms({name: column[group] for name, column in terms.items()})
        if "vision_relevance" in self._flags.reward_names():
            covers = [geometry.patch_cover(true_boxes(record)).mean() for record, geometry in zip(records, geometries)]
            overlaps = [score.set_iou for score in scores]
            self.add(vision_relevance_metrics(columns["attention_on_lesion"], covers, overlaps), len(texts))

    def hold_candidates(self, scored: ScoredCandidates, records: Sequence[Any], sizes: Sequence[int]) -> None:
        """Hold the candidates of each batch's first query of a sampling, until `write_candidates` ends the rollout.

        Args:
            scored: all candidates of the sampling.
            records: N, one for each candidate.
            sizes: queries of each batch; their sum is Q.
        """
        trainer, k = self._trainer, self._flags.umed_num_candidates
        step = trainer.state.global_step
        if not self._is_logged(step) or not trainer.is_world_process_zero():
            return
        callbacks, out = trainer.callback_handler.callbacks, trainer.args.output_dir
        held: list[tuple[int, Callable[..., None]]] = []
        for first in itertools.accumulate([0, *sizes[:-1]]):
            group = slice(first * k, (first + 1) * k)
            record = records[group.start]
            columns = {name: column[group] for name, column in scored.terms.items()}
            recipe = ({name: term[first].tolist() for name, term in scored.normalised.items()}, dict(scored.weights))
            image = os.path.join(trainer.train_dataset.data_args.image_folder, record["image"])
            shown = (record, scored.texts[group], scored.rewards[first].tolist(), columns)
            held.append((first, functools.partial(log_candidates, step, *shown, out, callbacks, image, recipe)))
        self._held.append(held)

    def write_candidates(self, sources: Sequence[tuple[int, int]] | None = None) -> None:
        """Write the held candidates of a rollout to the candidate log, every ``--umed_log_candidates`` steps.

        If a rollout feeds several steps, it is written when such a step has passed since the rollout before.

        Args:
            sources: (sampling, query) of each query that is learnt from; None: all are.
        """
        held, self._held = self._held, []
        learnt_from = None if sources is None else {*sources}
        for sampling, queries in enumerate(held):
            for query, write in queries:
                write(
                    extra_sampling=sampling,
                    learnt_from=learnt_from is None or (sampling, query) in learnt_from,
                )

    def _is_logged(self, step: int) -> bool:
        """Whether the candidates of a rollout at this step are written. It follows from the step alone, also in a resumed run."""
        every = self._flags.umed_log_candidates
        return every > 0 and step // every > (step - self._flags.steps_per_rollout()) // every

    def means(self) -> dict[str, float]:
        """Means since the last call over all ranks; then starts anew. All ranks must call."""
        self.add(self._guards.metrics())
        # A metric that this rank did not measure is 0 of 0 here: all ranks gather equally many numbers.
        own = [self._sums.pop(name, (0.0, 0.0)) for name in self._names]
        # So is one that came out as NaN, or the other ranks' would be lost too.
        known = [(total, count) if total == total else (0.0, 0.0) for total, count in own]
        totals, counts = self._gather([known]).sum(dim=0).unbind(dim=1)
        means = zip(self._names, (totals / counts).tolist())
        return {name: mean for name, mean in means if mean == mean}

    def warn(self, metrics: Mapping[str, float]) -> None:
        """Warn about each guard whose limit the metrics cross for the first time; once, on the first rank."""
        if self._trainer.is_world_process_zero():
            for warning in self._guards.warnings(metrics):
                warn(f"step {self._trainer.state.global_step}: {warning}")

    def progress(self) -> float:
        """Share of the run's rollouts that are done, 0-1: 0 at the first rollout and 1 at the last; 0 if there is but one.

        It follows from the number of steps, so that a resumed run has the same. A rollout that is sampled anew between its
        updates, because a checkpoint has lost it, counts as itself.
        """
        state, steps = self._trainer.state, self._flags.steps_per_rollout()
        last = -(-state.max_steps // steps) - 1
        return min(state.global_step // steps / max(last, 1), 1.0)

    def mean_over_ranks(self, value: float) -> float:
        """The mean of a number that each rank has one of. All ranks must call."""
        return self.means_over_ranks(value)[0]

    def means_over_ranks(self, *values: float) -> list[float]:
        """The mean of each of some numbers that each rank has one of. All ranks must call."""
        means: list[float] = self._gather([list(values)]).mean(dim=0).tolist()
        return means

    def most_of_ranks(self, value: float) -> float:
        """The largest of the ranks' numbers. All ranks must call."""
        return self._gather([value]).max().item()

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return int(self._trainer.state.global_step)

    def of_first_rank(self, value: float) -> float:
        """The first rank's number; a float32 must hold it. All ranks must call."""
        return self._gather([value])[0].item()

    def of_all_ranks(self, own: list[Any]) -> list[Any]:
        """The objects of all ranks: the first of each rank, then the second of each, and so on. All ranks must call."""
        if self._trainer.args.world_size == 1:
            return own
        lists: list[Any] = [None] * self._trainer.args.world_size
        torch.distributed.all_gather_object(lists, own)
        missing = object()
        rows = itertools.zip_longest(*lists, fillvalue=missing)
        return [item for row in rows for item in row if item is not missing]

    def on_any_rank(self, condition: bool) -> bool:
        """Whether the condition is true on at least one rank. All ranks must call."""
        return on_any_rank(self._trainer, condition)

    def _gather(self, rows: list[Any]) -> Tensor:
        # torch makes float64 of a row that contains a NumPy number, and ranks with different dtypes cannot gather.
        return self._trainer.accelerator.gather(
            torch.tensor(rows, dtype=torch.float32, device=self._trainer.args.device)
        )

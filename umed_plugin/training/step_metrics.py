"""What stage 2 logs beside the loss: means since the last log over all processes, guards with their warnings, sampled answers.

The figures of `umed_plugin.rewards.guards`, the rewards' own, those of the objective, and these four. Every process logs the same
names, also one whose batches had nothing to measure, or gathering would hang; a name that no process could measure is left out.

- ``reward/<term>``, ``reward/total``: means over the candidates, the terms before normalisation and weights.
- ``groups_without_signal``: share of questions whose candidates all have one reward, 0-1; GRPO learns nothing from them.
- ``answer_tokens``: mean length of the candidates.
- ``answers_cut_off``: share of candidates that ``--umed_max_new_tokens`` ended, 0-1.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.records import true_boxes
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.model.forward import Candidates
from umed_plugin.rewards import reward_metric_names
from umed_plugin.rewards.guards import GUARDS, VISION_RELEVANCE, Guards, vision_relevance_figures
from umed_plugin.training.candidate_log import log_candidates

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
_PPO = ("value_loss", "value_clip_fraction", "returns_mean", "advantage_std", "explained_variance")


def metric_names(flags: UmedFlags, rewards: Mapping[str, Any]) -> list[str]:
    """All that a run with these flags and rewards may log, in the order of its gathering."""
    names = [f"reward/{name}" for name in rewards]
    names += [*reward_metric_names(rewards), *_ALWAYS, *GUARDS, *VISION_RELEVANCE]
    names += ["feature_cache_hits"] if flags.umed_feature_cache is not None else []
    names += _PPO if flags.umed_algorithm == "ppo" else ()
    return names


class StepMetrics:
    """Collects figures from step to step and hands out their means.

    Args:
        trainer: of `transformers`; its accelerator gathers, its callbacks show the candidates, its state says the step.
        flags: of the run.
        names: see `metric_names`; the same in every process.
    """

    def __init__(self, trainer: Any, flags: UmedFlags, names: Sequence[str]) -> None:
        self._trainer, self._flags, self._names = trainer, flags, names
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._guards = Guards()

    def add(self, values: Mapping[str, float]) -> None:
        """Take in figures of one batch."""
        for name, value in values.items():
            self._measured[name].append(value)

    def add_rewards(
        self,
        values: Mapping[str, Sequence[float | None]],
        rewards: Tensor,
        candidates: Candidates,
        eos_token_id: int,
    ) -> None:
        """Take in the terms [N] and the rewards [Q, K] of candidates."""
        for name, column in values.items():
            known = [value for value in column if value is not None]
            if known:
                self.add({f"reward/{name}": sum(known) / len(known)})
        spread = rewards.max(dim=1).values - rewards.min(dim=1).values
        ended = (candidates.token_ids.eq(eos_token_id) & candidates.mask.bool()).any(dim=1)
        self.add(
            {
                "reward/total": rewards.mean().item(),
                "groups_without_signal": (spread < 1e-6).float().mean().item(),
                "answer_tokens": candidates.mask.sum(dim=1).float().mean().item(),
                "answers_cut_off": 1 - ended.float().mean().item(),
            }
        )

    def watch(self, texts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Show the candidates of each query to the guards; columns as a reward gets them."""
        k = self._flags.umed_num_candidates
        seen = [texts, columns["record"], columns["geometry"]]
        scores = [score_answer(text, record, geometry) for text, record, geometry in zip(*seen)]
        for first in range(0, len(texts), k):
            group = slice(first, first + k)
            self._guards.see(texts[group], scores[group], columns["record"][group], columns["geometry"][group])
        if "vision_relevance" in self._flags.reward_names():
            covers = [place.patch_cover(true_boxes(record)).mean() for record, place in zip(*seen[1:])]
            overlaps = [score.set_iou for score in scores]
            self.add(vision_relevance_figures(columns["attention_on_lesion"], covers, overlaps))

    def show_candidates(
        self, texts: Sequence[str], values: Mapping[str, Sequence[float | None]], rewards: Tensor, record: Any
    ) -> None:
        """Write the first query's candidates down, every so many steps."""
        trainer, every, k = self._trainer, self._flags.umed_log_candidates, self._flags.umed_num_candidates
        step = trainer.state.global_step
        if not every or step % every or not trainer.is_world_process_zero():
            return
        terms = {name: column[:k] for name, column in values.items()}
        callbacks = trainer.callback_handler.callbacks
        image = os.path.join(trainer.train_dataset.data_args.image_folder, record["image"])
        out = trainer.args.output_dir
        log_candidates(step, record, texts[:k], rewards[0].tolist(), terms, out, callbacks, image)

    def means(self) -> dict[str, float]:
        """The means since the last call, over all processes, all of which must call; begins anew."""
        self.add(self._guards.figures())
        columns = [self._measured.pop(name, [float("nan")]) for name in self._names]
        means = [[sum(column) / len(column) for column in columns]]
        overall = self._gather(means).nanmean(dim=0).tolist()
        return {name: mean for name, mean in zip(self._names, overall) if mean == mean}

    def warn(self, figures: Mapping[str, float]) -> None:
        """Print what has crossed a guard's limit for the first time, once for all processes."""
        if self._trainer.is_world_process_zero():
            for warning in self._guards.warnings(figures):
                print(f"umed: WARNING: step {self._trainer.state.global_step}: {warning}", flush=True)

    def mean_over_ranks(self, value: float) -> float:
        """The mean of a number that each process has one of; all must call."""
        return self._gather([value]).mean().item()

    def on_any_rank(self, said: bool) -> bool:
        """Whether one process at least says so; all must call."""
        return bool(self._gather([float(said)]).max())

    def _gather(self, rows: list[Any]) -> Tensor:
        # torch takes a row with one of numpy's numbers in it for float64, and processes that differ in this cannot gather.
        return self._trainer.accelerator.gather(
            torch.tensor(rows, dtype=torch.float32, device=self._trainer.args.device)
        )

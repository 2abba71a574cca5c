"""One rollout, from queries to advantages: sample K candidates, score them, reward them, compare them.

This is the first half of a step of stage 2, without gradient; `umed_plugin.training.trainer` learns from the result. In the order
of `ExperienceMaker.roll_out` and `ExperienceMaker.make`:

1. encode the images, sample K candidates for each query (`umed_plugin.training.candidate_sampling`). If vision relevance is all
   that 3 is for, the tokens that name the lesion read sampling's KV cache instead, without 3;
2. start slow rewards, so that a judge behind a network answers while the next passes run;
3. one pass of the policy: log-probabilities of the old policy, values, and attention on the lesion for vision relevance
   (`umed_plugin.training.answer_passes`);
4. one pass of the reference policy: its log-probabilities; where a rollout server has sampled, in every fifth rollout another one
   of the policy with its adapter off;
5. rewards. IoU is one of them: `umed_plugin.rewards.terms.localization`;
6. advantages: `umed_plugin.training.advantages`.

A rollout holds all batches of an optimizer step, or of several. A token costs nearly the same time for one answer and for a
hundred, since reading the weights dominates. So all batches of a step are sampled together, and under ZeRO-3 the weights are
gathered once. The passes of 3 and 4 go batch by batch: their logits need as much memory as the update's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.records import Record
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.forward import Candidates, base_llava, decode_answers
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.sampling import SamplingSettings
from umed_plugin.model.server_comparison import COMPARED_EVERY
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.rewards import (
    advance_rewards,
    collect_metrics,
    end_rollout,
    filled_over_queries,
    normalisation_of,
    normalised_terms,
    run_rewards,
    scored_answers,
    start_rewards,
    weighted_sum,
)
from umed_plugin.training.advantages import KLCoefficient, centre_groups
from umed_plugin.training.answer_packing import can_pack
from umed_plugin.training.answer_passes import AnswerPasses, batches_of
from umed_plugin.training.candidate_sampling import CandidateSampling, Lesions
from umed_plugin.training.cut_off import CutOff, ended
from umed_plugin.training.dynamic_sampling import Source, replace_without_signal
from umed_plugin.training.experience import (
    Experience,
    Samples,
    grpo_experience,
    kl_per_answer,
    ppo_experience,
    stacked,
)
from umed_plugin.training.reference import ReferencePolicy
from umed_plugin.training.rollout_engine import Ranks, rollout_engine
from umed_plugin.training.step_metrics import ScoredCandidates, StepMetrics, weight_of
from umed_plugin.training.stopping import rewards_agreed
from umed_plugin.training.value_head import ValueHead


class ExperienceMaker:
    """Turns batches of queries into what the updates learn from.

    Args:
        model: the policy at the start of stage 2, for its shapes and, if there is a KL, its reference.
        tokenizer: of the policy.
        flags: of the run.
        args: LLaVA's training arguments.
        rewards: by name, see `umed_plugin.rewards`.
        value_head: for PPO, or None.
        feature_cache: features of the frozen vision tower, or None.
        metrics: collects what is logged.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        flags: UmedFlags,
        args: Any,
        rewards: dict[str, Any],
        value_head: ValueHead | None,
        feature_cache: Any,
        metrics: StepMetrics,
    ) -> None:
        self.tokenizer, self.flags, self.args, self.rewards = tokenizer, flags, args, rewards
        self.value_head, self.metrics = value_head, metrics
        self.reward_schedule = dict(zip(rewards, flags.reward_schedule()))
        self.cut_off = CutOff(flags.umed_cut_off, penalty=sum(flags.reward_weights()))
        self.kl_coef = KLCoefficient(flags.kl_coef(), flags.umed_kl_target, flags.umed_kl_horizon)
        self._kl_of_answers: list[Tensor] = []

        # How answers are sampled, and what passes are made over them.
        self.packed = can_pack(base_llava(model), flags, args)
        self.scoring = Scoring(flags.umed_temperature, flags.umed_logit_rows, hidden=value_head is not None)
        self.lesions = Lesions(model, tokenizer, flags)
        settings = SamplingSettings(
            max_new_tokens=flags.umed_max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=flags.umed_temperature,
            num_candidates=flags.umed_num_candidates,
            packed=self.packed,
        )
        ranks = Ranks(args.process_index == 0, metrics.on_any_rank, metrics.of_first_rank)
        self.engine = rollout_engine(flags, settings, args.output_dir, ranks)
        reference = ReferencePolicy(model) if self.kl_coef.value > 0 else None
        self.sampling, self.passes = self._sampling_and_passes(settings, reference, feature_cache)

    def _sampling_and_passes(
        self, settings: SamplingSettings, reference: ReferencePolicy | None, feature_cache: Any
    ) -> tuple[CandidateSampling, AnswerPasses]:
        """Who samples and who makes the passes, and which of them measures vision relevance, if it is a reward."""
        head, watched = self.value_head, "vision_relevance" in self.rewards
        # Before the update's own pass, which gives them at first.
        needs_log_probs = (head is not None and reference is not None) or not self.flags.learnt_from_once()
        # If a whole pass would give nothing else that is needed, vision relevance is read from sampling's KV cache.
        needs_pass = head is not None or needs_log_probs or not self.engine.in_process
        in_sampling = watched and self.packed and not needs_pass
        of_passes = self.lesions if watched and not in_sampling else None
        return (
            CandidateSampling(
                self.flags, self.args, settings, self.engine, self.lesions, in_sampling, feature_cache, self.metrics
            ),
            AnswerPasses(self.scoring, self.packed, head, reference, needs_log_probs, of_passes),
        )

    def make(
        self,
        policy: Any,
        batches: Sequence[dict[str, Any]],
        further: Callable[[int], list[dict[str, Any]]] | None = None,
    ) -> Experience:
        """Sample a rollout of one or more batches, and turn its rewards into advantages.

        Args:
            policy: unwrapped.
            batches: from `umed_plugin.training.rewarding_data.collate_queries`, on the policy's device.
            further: gives batches with a number of further queries, for `umed_plugin.training.dynamic_sampling`.
        """
        with gathered_parameters(policy):
            self.engine.prepare(policy, self.metrics.step)
            samples = self.roll_out(policy, batches)
            sources: list[Source] | None = None
            if further is not None and self.flags.umed_dynamic_sampling:
                samples, sources = self._with_signal(policy, samples, further)
        end_rollout(self.rewards, self.rewards_agreed)
        self.metrics.write_candidates(sources)
        flags, kl_coef = self.flags, self.kl_coef.value
        if self.value_head is None:
            experience = grpo_experience(samples, kl_coef, flags.umed_reward_coef, self._common_spread(samples))
        else:
            if self.value_head.is_new():
                samples = self._begin_values(samples, self.value_head)
            experience, metrics = ppo_experience(
                samples, kl_coef, flags.umed_reward_coef, flags.umed_gamma, flags.umed_gae_lambda
            )
            self.metrics.add(metrics)
        # Without log-probabilities from here, the update's own passes give them and call these two.
        if samples.log_probs is not None:
            self.measure_kl(samples, samples.log_probs)
            self.adapt_kl()
        return experience

    def _with_signal(
        self, policy: Any, samples: Samples, further: Callable[[int], list[dict[str, Any]]]
    ) -> tuple[Samples, list[Source]]:
        """The samples with groups of further queries in place of those without signal, and their sources. All ranks must call."""
        samples, sources, rounds = replace_without_signal(
            samples,
            lambda count: self.roll_out(policy, further(count)),
            lambda own: int(self.metrics.most_of_ranks(own)),
            self.flags.umed_dynamic_sampling,
        )
        replaced = sum(sampling > 0 for sampling, _ in sources) * self.args.world_size
        self.metrics.add({"groups_replaced": replaced, "extra_samplings": rounds})
        return samples, sources

    def measure_kl(self, samples: Samples, log_probs: Tensor) -> None:
        """Measure the KL of the policy that sampled, with its ``log_probs`` [N, T]; `adapt_kl` uses it."""
        if samples.reference_log_probs is not None:
            self._kl_of_answers.append(kl_per_answer(log_probs, samples.reference_log_probs, samples.mask))

    def adapt_kl(self) -> None:
        """Adapt the weight of the KL to the target, by all answers measured since the last call. All ranks must call."""
        if self._kl_of_answers:
            own = torch.cat(self._kl_of_answers)
            self._kl_of_answers = []
            kl = self.metrics.mean_over_ranks(own.mean().item())
            self.metrics.add({"kl_per_answer": kl, "kl_coef": self.kl_coef.value})
            self.kl_coef.update(kl, len(own) * self.args.world_size)

    def _begin_values(self, samples: Samples, value_head: ValueHead) -> Samples:
        """Let a new value network predict the mean reward of all ranks' counted answers, also in these samples."""
        by_query = samples.counted_by_query
        counted = samples.rewards if by_query is None else samples.rewards[by_query]
        total, answers = self.metrics.means_over_ranks(counted.sum().item(), float(counted.numel()))
        mean = self.flags.umed_reward_coef * total / max(answers, 1e-6)
        value_head.begin_at(mean)
        return replace(samples, values=torch.full(samples.mask.shape, mean, device=samples.mask.device))

    def _common_spread(self, samples: Samples) -> Tensor | float | None:
        """Standard deviation of all ranks' rewards around their queries' means, 1 for none; None if each query uses its own."""
        if self.flags.umed_advantage_scale != "batch":
            return 1.0 if self.flags.umed_advantage_scale == "none" else None
        rewards = samples.rewards
        by_query = samples.counted_by_query
        counted = torch.ones_like(rewards) if by_query is None else by_query.to(rewards)
        squares = self.metrics.mean_over_ranks(centre_groups(rewards, counted).square().sum().item())
        answers = self.metrics.mean_over_ranks(counted.sum().item())
        return rewards.new_tensor(squares / max(answers, 1e-6)).sqrt()

    @torch.no_grad()
    def roll_out(self, policy: Any, batches: Sequence[dict[str, Any]]) -> Samples:
        """Sample K candidates for each query of all batches, reward them, and keep what the updates need."""
        was_training = policy.training
        policy.eval()
        queries = self.sampling.queries(policy, batches)
        with self.engine.agreed():
            candidates, attention, sampled_log_probs = self.sampling.sample(policy, queries)

        # Slow rewards (a judge behind a network) run from here on, while policy and reference make their passes.
        questions, texts, columns = self._reward_inputs(candidates, queries.records)
        with self.rewards_agreed():
            start_rewards(self.rewards, questions, texts, **columns)
        sizes = [len(batch["prompt_ids"]) for batch in batches]
        rollout = self.metrics.step // self.flags.steps_per_rollout()
        compared = not self.engine.in_process and rollout % COMPARED_EVERY == 0
        parts = [
            self.passes.scores(policy, *part, was_training, compared) for part in batches_of(queries, candidates, sizes)
        ]

        # Vision relevance rewards the attention that sampling or the policy's pass has recorded.
        columns["attention_on_lesion"] = attention or [share for part in parts for share in part.attention]
        counted, rewards = self._reward(candidates, questions, texts, columns, sizes)
        policy.train(was_training)
        # Under CPU autocast the passes above have cached half-precision copies of the weights without a graph. The update would
        # use them, and LoRA would get no gradient.
        torch.clear_autocast_cache()
        return Samples(
            queries.prompt_ids,
            queries.features,
            candidates.token_ids,
            candidates.mask,
            stacked([part.log_probs for part in parts]),
            stacked([part.reference_log_probs for part in parts]),
            stacked([part.values for part in parts]),
            rewards,
            counted,
            sampled_log_probs,
            stacked([part.log_probs_without_adapter for part in parts]),
        )

    def rewards_agreed(self) -> AbstractContextManager[None]:
        """A block in which a reward may fail, such as a judge that never answers. All ranks enter it."""
        return rewards_agreed(self.metrics.on_any_rank)

    def _reward_inputs(
        self, candidates: Candidates, records: list[Any]
    ) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """What a reward gets, N entries each: questions, answers and columns."""
        repeated = [record for record in records for _ in range(self.flags.umed_num_candidates)]
        columns = {"record": repeated, "geometry": [self.lesions.geometry(record) for record in repeated]}
        questions = [record["conversations"][0]["value"] for record in repeated]
        return questions, decode_answers(self.tokenizer, candidates), columns

    def _reward(
        self,
        candidates: Candidates,
        questions: list[str],
        texts: list[str],
        columns: dict[str, list[Any]],
        sizes: Sequence[int],
    ) -> tuple[Tensor | None, Tensor]:
        """Which answers are learnt from, as in `Samples`, and [Q, K] rewards; each term is logged separately."""
        # All that comes from a user's own rewards is asked for here, where each process learns of another's failure.
        with self.rewards_agreed():
            terms = run_rewards(self.rewards, questions, texts, **columns)
            own_metrics = collect_metrics(self.rewards)
            normalisation = normalisation_of(self.rewards, columns)
        self.metrics.add(own_metrics)
        advance_rewards(self.rewards, self.metrics.of_all_ranks, self.rewards_agreed)
        has_ended = ended(candidates, self.tokenizer.eos_token_id)
        weights = self._weights()
        counted = self.cut_off.counted(has_ended)
        ppo = self.value_head is not None
        if ppo:  # which compares questions too
            scored = scored_answers(terms, weights).to(has_ended.device)
            self.metrics.add({"answers_unrewarded": 1 - scored.float().mean().item()}, len(scored))
            counted = scored if counted is None else counted & scored
        normalised = normalised_terms(
            {name: _left_out(column, counted) for name, column in terms.items()},
            self.flags.umed_num_candidates,
            norm=self.flags.umed_reward_norm,
            floor=self.flags.umed_reward_floor,
            missing=math.nan if ppo else 0.0,
            **normalisation,
        )
        if ppo:
            normalised = filled_over_queries(normalised, self.metrics.means_over_ranks)
        rewards = weighted_sum(normalised, weights)
        cut_off = replace(self.cut_off, penalty=sum(weights.values()))
        rewards = cut_off.rewards(rewards, has_ended.to(rewards.device))
        self.metrics.add_rewards(terms, rewards, candidates, has_ended)
        self.metrics.add_guards(texts, columns, terms)
        candidates_of_log = ScoredCandidates(texts, terms, normalised, weights, rewards)
        self.metrics.hold_candidates(candidates_of_log, columns["record"], sizes)
        return counted, rewards

    def _weights(self) -> dict[str, float]:
        """The rewards' weights in this rollout; those that change are logged."""
        progress = self.metrics.progress()
        changing = [name for name, weight in self.reward_schedule.items() if weight.changes]
        self.metrics.add({weight_of(name): self.reward_schedule[name].at(progress) for name in changing})
        return {name: weight.at(progress) for name, weight in self.reward_schedule.items()}

    def geometry(self, record: Record) -> ImageGeometry:
        """Where a record's image lies in the square that the vision tower sees."""
        return self.lesions.geometry(record)


def _left_out(column: Sequence[float | None], counted: Tensor | None) -> Sequence[float | None]:
    """A reward's N values, None for answers that are not learnt from: `combine_rewards` leaves them out of its statistics."""
    if counted is None:
        return column
    return [value if count else None for value, count in zip(column, counted.tolist())]

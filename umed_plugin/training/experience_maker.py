"""One rollout, from queries to advantages: sample K candidates, score them, reward them, compare them.

This is the first half of a step of stage 2, without gradient; `umed_plugin.training.trainer` learns from the result. In the order
of `ExperienceMaker.roll_out` and `ExperienceMaker.make`:

1. encode the images, sample K candidates for each query (`umed_plugin.model.sampling`);
2. start slow rewards, so that a judge behind a network answers while the next passes run;
3. one pass of the policy: log-probabilities of the old policy, values, and attention on the lesion for vision relevance;
4. one pass of the reference policy: its log-probabilities;
5. rewards. IoU is one of them: `umed_plugin.rewards.terms.localization`;
6. advantages: `umed_plugin.training.advantages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.records import Record, record_geometry, true_boxes
from umed_plugin.errors import note
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.model.attention import AttentionSettings, attention_on_lesion
from umed_plugin.model.forward import (
    AnswerPass,
    Candidates,
    PromptBatch,
    answer_log_probs,
    answer_pass,
    base_llava,
    decode_answers,
    embed_prompts,
    encode_images,
)
from umed_plugin.model.packing import packing_fault
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.model.token_spans import lesion_naming_tokens
from umed_plugin.rewards import collect_metrics, combine_rewards, normalisation_of, run_rewards, start_rewards
from umed_plugin.training.advantages import KLCoefficient, centre_groups
from umed_plugin.training.experience import Experience, Samples, grpo_experience, join, kl_per_answer, ppo_experience
from umed_plugin.training.reference import ReferencePolicy
from umed_plugin.training.step_metrics import StepMetrics
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
        self.value_head, self.feature_cache, self.metrics = value_head, feature_cache, metrics
        llava = base_llava(model)
        tower = llava.get_vision_tower().config
        self.image_size, self.patch_size = tower.image_size, tower.patch_size
        self.reward_weights = dict(zip(rewards, flags.reward_weights()))
        self.packed = self._can_pack(llava)
        self.attention = AttentionSettings(
            flags.vrr_layer_indices(llava.config.num_hidden_layers),
            flags.vrr_head_indices(llava.config.num_attention_heads),
            flags.umed_vrr_mask_sinks,
        )
        self.sampling = SamplingSettings(
            max_new_tokens=flags.umed_max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=flags.umed_temperature,
            top_p=flags.umed_top_p,
            num_candidates=flags.umed_num_candidates,
            packed=self.packed,
        )
        self.kl_coef = KLCoefficient(flags.kl_coef(), flags.umed_kl_target, flags.umed_kl_horizon)
        self.reference = ReferencePolicy(model) if self.kl_coef.value > 0 else None

    def _can_pack(self, llava: Any) -> bool:
        """Whether the K answers of a query can share a row with its prompt; tells the user if the model cannot."""
        if not self.flags.umed_packed:
            return False
        with gathered_parameters(llava):
            fault = packing_fault(llava)
        if fault is not None and self.args.process_index == 0:
            note(
                f"{fault}: answers are not packed. Sampling copies the prompt's KV cache for each answer, and under gradient "
                "checkpointing the update repeats the prompt for each. Another attention implementation (eager, sdpa) can pack; "
                "--umed_packed False accepts this and silences the note."
            )
        return fault is None

    def make(self, policy: Any, batches: Iterable[dict[str, Any]]) -> Experience:
        """Sample a rollout of one or more batches, and turn its rewards into advantages.

        Args:
            policy: unwrapped.
            batches: from `umed_plugin.training.rewarding_data.collate_queries`, on the policy's device.
        """
        with gathered_parameters(policy):
            samples = join([self.roll_out(policy, batch) for batch in batches])
        flags, kl_coef = self.flags, self.kl_coef.value
        if self.value_head is None:
            experience = grpo_experience(samples, kl_coef, flags.umed_reward_coef, self._common_spread(samples.rewards))
        else:
            if self.value_head.is_new():
                samples = self._begin_values(samples, self.value_head)
            experience, metrics = ppo_experience(
                samples, kl_coef, flags.umed_reward_coef, flags.umed_gamma, flags.umed_gae_lambda
            )
            self.metrics.add(metrics)
        # Without log-probabilities from here, the update's own pass gives them and calls adapt_kl.
        if samples.log_probs is not None:
            self.adapt_kl(samples, samples.log_probs)
        return experience

    def adapt_kl(self, samples: Samples, log_probs: Tensor) -> None:
        """Measure the KL of the policy that sampled, with its ``log_probs`` [N, T], and adapt its weight to the target."""
        if samples.reference_log_probs is not None:
            own_kl = kl_per_answer(log_probs, samples.reference_log_probs, samples.mask)
            kl = self.metrics.mean_over_ranks(own_kl)
            self.metrics.add({"kl_per_answer": kl, "kl_coef": self.kl_coef.value})
            self.kl_coef.update(kl, len(samples.mask) * self.args.world_size)

    def _begin_values(self, samples: Samples, value_head: ValueHead) -> Samples:
        """Let a new value network predict the mean reward of all ranks, also in these samples."""
        mean = self.flags.umed_reward_coef * self.metrics.mean_over_ranks(samples.rewards.mean().item())
        value_head.begin_at(mean)
        return replace(samples, values=torch.full(samples.mask.shape, mean, device=samples.mask.device))

    def _common_spread(self, rewards: Tensor) -> Tensor | None:
        """Standard deviation of all ranks' rewards around their queries' means; None if each query uses its own."""
        if self.flags.umed_advantage_scale == "group":
            return None
        variance = self.metrics.mean_over_ranks(centre_groups(rewards).square().mean().item())
        return rewards.new_tensor(variance).sqrt()

    @torch.no_grad()
    def roll_out(self, policy: Any, inputs: dict[str, Any]) -> Samples:
        """Sample K candidates for each query of a batch, reward them, and keep what the update needs."""
        was_training = policy.training
        policy.eval()
        features = self._encode(policy, inputs)
        prompts = embed_prompts(policy, inputs["prompt_ids"], features)
        candidates = generate(policy, prompts, self.sampling)

        # Slow rewards (a judge behind a network) run from here on, while policy and reference make their passes.
        questions, texts, columns = self._reward_inputs(candidates, inputs["records"])
        start_rewards(self.rewards, questions, texts, **columns)
        attention, outputs = self._score_policy(policy, prompts, candidates, inputs["records"], columns["record"])
        values = None if self.value_head is None or outputs is None else self.value_head(outputs.hidden)
        old_log_probs = None if outputs is None else self._log_probs(outputs, candidates)
        reference_log_probs = self._reference_log_probs(policy, inputs["prompt_ids"], features, candidates)

        # Vision relevance rewards the attention that the policy's pass has recorded.
        columns["attention_on_lesion"] = list(attention)
        rewards = self._reward(candidates, questions, texts, columns)
        policy.train(was_training)
        # Under CPU autocast the passes above have cached half-precision copies of the weights without a graph. The update would
        # use them, and LoRA would get no gradient.
        torch.clear_autocast_cache()
        return Samples(
            inputs["prompt_ids"],
            features,
            candidates.token_ids,
            candidates.mask,
            old_log_probs,
            reference_log_probs,
            values,
            rewards,
        )

    def _encode(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        """[Q, P, D] patch features of the queries' images, from the feature cache where it has them."""
        cached = inputs["features"]
        if self.feature_cache is None:
            # The tower's output has another memory layout than features read from a cache, and bf16 kernels round by layout.
            return encode_images(policy, inputs["images"]).contiguous()
        self.metrics.add({"feature_cache_hits": sum(features is not None for features in cached) / len(cached)})
        names = inputs["features_names"]
        return self.feature_cache.complete(cached, names, lambda: encode_images(policy, inputs["images"]))

    def _reward_inputs(
        self, candidates: Candidates, records: list[Any]
    ) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """What a reward gets, N entries each: questions, answers and columns."""
        repeated = [record for record in records for _ in range(self.flags.umed_num_candidates)]
        columns = {"record": repeated, "geometry": [self.geometry(record) for record in repeated]}
        questions = [record["conversations"][0]["value"] for record in repeated]
        return questions, decode_answers(self.tokenizer, candidates), columns

    def _score_policy(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, records: list[Any], repeated: list[Any]
    ) -> tuple[Sequence[float | None], AnswerPass | None]:
        """The policy's pass over its candidates: N shares of attention on the lesion, and the pass's outputs.

        The pass serves the old log-probabilities, the values and vision relevance. It is skipped, and the outputs are None, if
        the update's own pass gives all that is needed.

        Args:
            records: Q records; ``repeated`` has one for each candidate.
        """
        if "vision_relevance" not in self.rewards:
            unneeded = self.flags.rollout_is_one_batch()
            outputs = None if unneeded else answer_pass(policy, prompts, candidates, packed=self.packed)
            return [None] * len(candidates.mask), outputs
        tokens = lesion_naming_tokens(self.tokenizer, candidates, repeated)
        cover = torch.stack(
            [torch.from_numpy(self.geometry(record).patch_cover(true_boxes(record))) for record in records]
        )
        shares, outputs = attention_on_lesion(
            policy, prompts, candidates, tokens, cover, self.attention, packed=self.packed
        )
        return shares.tolist(), outputs

    def _reference_log_probs(
        self, policy: Any, prompt_ids: list[Tensor], features: Tensor, candidates: Candidates
    ) -> Tensor | None:
        """[N, T] under the reference policy, or None without a KL."""
        if self.reference is None:
            return None
        with self.reference.as_reference(policy):
            # The projector is trained, so the prompts are embedded anew under the reference.
            outputs = answer_pass(policy, embed_prompts(policy, prompt_ids, features), candidates, packed=self.packed)
            return self._log_probs(outputs, candidates)

    def _log_probs(self, outputs: AnswerPass, candidates: Candidates) -> Tensor:
        return answer_log_probs(outputs.logits, candidates, temperature=self.flags.umed_temperature).log_probs

    def _reward(
        self, candidates: Candidates, questions: list[str], texts: list[str], columns: dict[str, list[Any]]
    ) -> Tensor:
        """[Q, K] rewards; each term is logged separately."""
        terms = run_rewards(self.rewards, questions, texts, **columns)
        self.metrics.add(collect_metrics(self.rewards))
        rewards = combine_rewards(
            terms,
            self.flags.umed_num_candidates,
            weights=self.reward_weights,
            norm=self.flags.umed_reward_norm,
            floor=self.flags.umed_reward_floor,
            **normalisation_of(self.rewards, columns),
        )
        self.metrics.add_rewards(terms, rewards, candidates, self.tokenizer.eos_token_id)
        self.metrics.add_guards(texts, columns)
        self.metrics.log_candidates(texts, terms, rewards, columns["record"][0])
        return rewards

    def geometry(self, record: Record) -> ImageGeometry:
        """Where a record's image lies in the square that the vision tower sees."""
        return record_geometry(record, self.image_size, self.patch_size)

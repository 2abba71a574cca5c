"""A rollout from its queries to its advantages: sample K candidates each, look at lesions, ask the reference, reward, compare.

The first half of a step of stage 2, without a gradient; `umed_plugin.training.trainer` learns from what comes out. What works
beside the candidates is started as soon as they are there, so that a judge behind a network answers while the passes go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umed_plugin.data.records import Record, record_geometry, true_boxes
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
from umed_plugin.rewards import collect_metrics, combine_rewards, normalisation_of, start_rewards
from umed_plugin.training.advantages import KLCoefficient, centre_groups
from umed_plugin.training.experience import Experience, Samples, grpo_experience, join, kl_per_answer, ppo_experience
from umed_plugin.training.reference import ReferencePolicy
from umed_plugin.training.step_metrics import StepMetrics
from umed_plugin.training.value_head import ValueHead


class ExperienceMaker:
    """Turns batches of queries into what the updates learn from.

    Args:
        model: the policy as stage 2 begins with it, for its shapes and, where a KL is wanted, its reference.
        tokenizer: of the policy.
        flags: of the run.
        args: LLaVA's training arguments.
        rewards: by name, see :mod:`umed_plugin.rewards`.
        value_head: of PPO, or None.
        cache: features of the frozen vision tower, or None.
        measures: takes in what is logged.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        flags: UmedFlags,
        args: Any,
        rewards: dict[str, Any],
        value_head: ValueHead | None,
        cache: Any,
        measures: StepMetrics,
    ) -> None:
        self.tokenizer, self.flags, self.args, self.rewards = tokenizer, flags, args, rewards
        self.value_head, self.cache, self.measures = value_head, cache, measures
        self.learnt_from_once = flags.rollout_is_one_batch()
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
        """Whether answers are computed beside one copy of their prompt; says so when the model cannot."""
        if not self.flags.umed_packed:
            return False
        with gathered_parameters(llava):
            fault = packing_fault(llava)
        if fault is not None and self.args.process_index == 0:
            print(
                f"umed: {fault}: answers are not packed. Sampling copies the prompt's cache for each answer, and under gradient "
                "checkpointing the update repeats the prompt for each. Another attention (eager, sdpa) can pack; --umed_packed "
                "False takes this as it is.",
                flush=True,
            )
        return fault is None

    def make(self, policy: Any, batches: Iterable[dict[str, Any]]) -> Experience:
        """Sample a rollout of one or several batches, and turn its rewards into advantages.

        Args:
            policy: unwrapped.
            batches: of `umed_plugin.training.rewarding_data.collate_queries`, on the policy's device.
        """
        with gathered_parameters(policy):
            samples = join([self.roll_out(policy, batch) for batch in batches])
        flags, kl_coef = self.flags, self.kl_coef.value
        if self.value_head is None:
            experience = grpo_experience(samples, kl_coef, flags.umed_reward_coef, self._common_spread(samples.rewards))
        else:
            if self.value_head.is_new():
                samples = self._begin_values(samples, self.value_head)
            experience, figures = ppo_experience(
                samples, kl_coef, flags.umed_reward_coef, flags.umed_gamma, flags.umed_gae_lambda
            )
            self.measures.add(figures)
        if samples.log_probs is not None:
            self.steer_kl(samples, samples.log_probs)
        return experience

    def steer_kl(self, samples: Samples, log_probs: Tensor) -> None:
        """Measure the KL of the policy that sampled, [N, T] ``log_probs``, and let its weight follow its target."""
        if samples.reference_log_probs is not None:
            found = kl_per_answer(log_probs, samples.reference_log_probs, samples.mask)
            kl = self.measures.mean_over_ranks(found)
            self.measures.add({"kl_per_answer": kl, "kl_coef": self.kl_coef.value})
            self.kl_coef.update(kl, len(samples.mask) * self.args.world_size)

    def _begin_values(self, samples: Samples, value_head: ValueHead) -> Samples:
        """Let a new value network predict the mean reward of all processes, in these samples too."""
        mean = self.flags.umed_reward_coef * self.measures.mean_over_ranks(samples.rewards.mean().item())
        value_head.begin_at(mean)
        return replace(samples, values=torch.full(samples.mask.shape, mean, device=samples.mask.device))

    def _common_spread(self, rewards: Tensor) -> Tensor | None:
        """The standard deviation of all processes' rewards around their queries' means; None if each query has its own."""
        if self.flags.umed_advantage_scale == "group":
            return None
        variance = self.measures.mean_over_ranks(centre_groups(rewards).square().mean().item())
        return rewards.new_tensor(variance).sqrt()

    @torch.no_grad()
    def roll_out(self, policy: Any, inputs: dict[str, Any]) -> Samples:
        """Sample K candidates for each query of a batch, reward them, and keep what the update needs."""
        was_training = policy.training
        policy.eval()
        features = self._encode(policy, inputs)
        prompts = embed_prompts(policy, inputs["prompt_ids"], features)
        candidates = generate(policy, prompts, self.sampling)
        questions, texts, columns = self._answered(candidates, inputs["records"])
        start_rewards(self.rewards, questions, texts, **columns)
        attention, passed = self._look_at_lesions(policy, prompts, candidates, inputs["records"], columns["record"])
        values = None if self.value_head is None or passed is None else self.value_head(passed.hidden)
        old = None if passed is None else self._log_probs(passed, candidates)
        reference = self._reference_log_probs(policy, inputs["prompt_ids"], features, candidates)
        columns["attention_on_lesion"] = list(attention)
        rewards = self._reward(candidates, questions, texts, columns)
        policy.train(was_training)
        # Under CPU autocast the passes above have left half-precision copies of the weights without a graph: the update would
        # use them, and LoRA would get no gradient.
        torch.clear_autocast_cache()
        return Samples(
            inputs["prompt_ids"], features, candidates.token_ids, candidates.mask, old, reference, values, rewards
        )

    def _encode(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        """[Q, P, D] patch features of the queries' images, read from the cache where it has them."""
        cache, found = self.cache, inputs["features"]
        if cache is None:
            # The tower's output lies in memory otherwise than what is read from a cache, and bf16 kernels round by that.
            return encode_images(policy, inputs["images"]).contiguous()
        self.measures.add({"feature_cache_hits": sum(features is not None for features in found) / len(found)})
        return cache.complete(found, inputs["features_names"], lambda: encode_images(policy, inputs["images"]))

    def _answered(
        self, candidates: Candidates, records: list[Any]
    ) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """What a reward is given, one entry a candidate: questions, answers and columns."""
        repeated = [record for record in records for _ in range(self.flags.umed_num_candidates)]
        columns = {"record": repeated, "geometry": [self.geometry(record) for record in repeated]}
        questions = [record["conversations"][0]["value"] for record in repeated]
        return questions, decode_answers(self.tokenizer, candidates), columns

    def _look_at_lesions(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, records: list[Any], repeated: list[Any]
    ) -> tuple[Sequence[float | None], AnswerPass | None]:
        """Attention of each candidate on its query's lesion, and what else the same pass gives; ``repeated``: one a candidate.

        There is no pass where the update's own would give all that it does.
        """
        if "vision_relevance" not in self.rewards:
            passed = None if self.learnt_from_once else answer_pass(policy, prompts, candidates, packed=self.packed)
            return [None] * len(candidates.mask), passed
        rows = lesion_naming_tokens(self.tokenizer, candidates, repeated)
        cover = torch.stack(
            [torch.from_numpy(self.geometry(record).patch_cover(true_boxes(record))) for record in records]
        )
        values, passed = attention_on_lesion(
            policy,
            prompts,
            candidates,
            rows,
            cover,
            self.attention,
            packed=self.packed,
        )
        return values.tolist(), passed

    def _reference_log_probs(
        self, policy: Any, prompt_ids: list[Tensor], features: Tensor, candidates: Candidates
    ) -> Tensor | None:
        if self.reference is None:
            return None
        with self.reference.as_reference(policy):
            passed = answer_pass(policy, embed_prompts(policy, prompt_ids, features), candidates, packed=self.packed)
            return self._log_probs(passed, candidates)

    def _log_probs(self, passed: AnswerPass, candidates: Candidates) -> Tensor:
        return answer_log_probs(passed.logits, candidates, temperature=self.flags.umed_temperature).log_probs

    def _reward(
        self, candidates: Candidates, questions: list[str], texts: list[str], columns: dict[str, list[Any]]
    ) -> Tensor:
        """[Q, K] rewards; every term is measured on its own."""
        values = {name: reward(questions, texts, **columns) for name, reward in self.rewards.items()}
        self.measures.add(collect_metrics(self.rewards))
        rewards = combine_rewards(
            values,
            self.flags.umed_num_candidates,
            weights=self.reward_weights,
            norm=self.flags.umed_reward_norm,
            floor=self.flags.umed_reward_floor,
            **normalisation_of(self.rewards),
        )
        self.measures.add_rewards(values, rewards, candidates, self.tokenizer.eos_token_id)
        self.measures.watch(texts, columns)
        self.measures.show_candidates(texts, values, rewards, columns["record"][0])
        return rewards

    def geometry(self, record: Record) -> ImageGeometry:
        """Where a record's image lies in the square that the vision tower sees."""
        return record_geometry(record, self.image_size, self.patch_size)

"""Stage 2, Abnormal-Aware Rewarding, as a subclass of LLaVA's own trainer.

A training step takes a batch of queries, samples K candidates for each, scores them, and returns the policy objective as the
loss; LoRA, DeepSpeed, schedules, logging and checkpoints stay the trainer's. ``per_device_train_batch_size`` counts queries.
With ``--umed_updates_per_rollout`` above 1 the same candidates serve several optimizer steps.

Run it with ``umed-run ... --umed_stage rewarding``; departures from the paper are listed in :mod:`umed_plugin.objective` and
:mod:`umed_plugin.rewards.combine`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor, nn

from umed_plugin.attention import attention_on_lesion, lesion_name_rows
from umed_plugin.errors import UmedError
from umed_plugin.geometry import ImageGeometry
from umed_plugin.guards import GUARDS, Guards
from umed_plugin.objective import ObjectiveSettings, group_advantages, policy_objective
from umed_plugin.packing import packing_fault
from umed_plugin.records import Record, record_geometry, true_boxes
from umed_plugin.reference import ReferencePolicy
from umed_plugin.rewards import (
    StopForReward,
    combine_rewards,
    make_rewards,
    measured_by,
    measures_of,
    start_rewards,
)
from umed_plugin.rollout import (
    AnswerPass,
    Candidates,
    PromptBatch,
    answer_log_probs,
    answer_pass,
    base_llava,
    decode_answers,
    embed_prompts,
    encode_images,
    generate,
)
from umed_plugin.sampler import EpochSampler
from umed_plugin.scoring import score_answer
from umed_plugin.validation import HeldOutCurve

_MEASURES = (
    "reward/total",
    "policy_loss",
    "kl",
    "entropy",
    "clip_fraction",
    "groups_without_signal",
    "answer_tokens",
    "answers_cut_off",
)


@dataclass(frozen=True)
class Rollout:
    """Candidates of a batch of queries and what the update needs of them; shapes as in :mod:`umed_plugin.rollout`."""

    prompt_ids: list[Tensor]
    image_features: Tensor
    candidates: Candidates
    old_log_probs: Tensor
    reference_log_probs: Tensor | None
    advantages: Tensor


class RewardingTrainer(LLaVATrainer):
    """LLaVA's trainer with the objective of Abnormal-Aware Rewarding.

    Args:
        model: a LLaVA model, with a LoRA adapter or without.
        tokenizer: its tokenizer.
        args: LLaVA's training arguments; ``args.umed`` holds the flags.
        val_dataset: held-out queries for ``--umed_val_every``.
        keywords: the rest of the data module and whatever else ``transformers.Trainer`` takes.
    """

    def __init__(self, model: Any, tokenizer: Any, args: Any, val_dataset: Any = None, **keywords: Any) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the update must see the policy that sampled
        super().__init__(model=model, tokenizer=tokenizer, args=args, **keywords)
        self.flags = args.umed
        llava = base_llava(model)
        tower = llava.get_vision_tower().config
        self.image_size, self.patch_size = tower.image_size, tower.patch_size
        self.reward_functions = make_rewards(self.flags, args.output_dir)
        self.add_callback(StopForReward(self.reward_functions, self._in_any_process))
        self.reward_weights = dict(zip(self.reward_functions, self.flags.reward_weights()))
        self.packed = self._can_pack(llava)
        self.vrr_layers = self.flags.vrr_layer_indices(llava.config.num_hidden_layers)
        if self.flags.umed_feature_cache is not None:
            said = self.train_dataset.use_cache(self.flags.umed_feature_cache, llava.get_vision_tower())
            if self.args.process_index == 0:
                print(f"umed: {said}", flush=True)
        self.settings = ObjectiveSettings(
            self.flags.umed_clip_range, self.flags.umed_kl_coef, self.flags.umed_entropy_coef
        )
        self.reference = ReferencePolicy(model) if self.flags.umed_kl_coef > 0 else None
        # Every process logs the same names, also one whose batches had nothing to measure, or gathering would hang.
        rewards = [f"reward/{name}" for name in self.reward_functions]
        self._measures = [*rewards, *measures_of(self.reward_functions), *_MEASURES, *GUARDS]
        self._measures += ["feature_cache_hits"] if self.train_dataset.cache is not None else []
        self._measured: dict[str, list[float]] = defaultdict(list)
        self.guards = Guards()
        self._rollouts: dict[int, Rollout] = {}
        self._batches_seen: int | None = None
        if val_dataset is not None:
            self.add_callback(HeldOutCurve(self, val_dataset))

    def _can_pack(self, llava: Any) -> bool:
        """Whether answers are computed beside one copy of their prompt; says so when the model cannot."""
        if not self.flags.umed_packed:
            return False
        fault = packing_fault(llava)
        if fault is not None and self.args.process_index == 0:
            print(
                f"umed: {fault}: each answer is computed apart, which costs several times more. Another attention (eager, sdpa) "
                "can share the prompt; --umed_packed False takes this as it is.",
                flush=True,
            )
        return fault is None

    def _get_train_sampler(self, *unused: Any) -> EpochSampler:
        """Queries in an order that survives resuming; they are of one length, so LLaVA's grouping by length has no use here."""
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        chunk = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if self.flags.umed_updates_per_rollout > 1 and len(self.train_dataset) < chunk:
            raise UmedError(
                f"{len(self.train_dataset)} records do not fill one optimizer step of {chunk} questions (batch size x processes "
                "x accumulation steps), which --umed_updates_per_rollout above 1 needs. Lower --per_device_train_batch_size "
                "or --gradient_accumulation_steps."
            )
        return EpochSampler(len(self.train_dataset), seed, chunk, self.flags.umed_updates_per_rollout)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any) -> Tensor:
        """The objective on a batch of queries; its candidates are sampled unless an earlier update has sampled them."""
        rollout = self._rollout_for(model, inputs)
        prompts = embed_prompts(self.accelerator.unwrap_model(model), rollout.prompt_ids, rollout.image_features)
        answers = answer_log_probs(
            answer_pass(model, prompts, rollout.candidates, packed=self.packed).logits,
            rollout.candidates,
            temperature=self.flags.umed_temperature,
            entropy_gradient=self.settings.entropy_coef != 0,
        )
        loss, terms = policy_objective(
            answers.log_probs,
            rollout.old_log_probs,
            rollout.reference_log_probs,
            answers.entropy,
            rollout.advantages,
            rollout.candidates.mask,
            self.settings,
        )
        self._measure({name: value.item() for name, value in terms.items()})
        return loss

    def _rollout_for(self, model: Any, inputs: dict[str, Any]) -> Rollout:
        """Sample at the first of the updates that share a rollout; after resuming in between, sample anew."""
        steps = self.args.gradient_accumulation_steps
        if self._batches_seen is None:
            self._batches_seen = self.state.global_step * steps
        slot, update = self._batches_seen % steps, self._batches_seen // steps % self.flags.umed_updates_per_rollout
        self._batches_seen += 1
        if update == 0 or slot not in self._rollouts:
            self._rollouts[slot] = self.roll_out(model, inputs)
        return self._rollouts[slot]

    @torch.no_grad()
    def roll_out(self, model: Any, inputs: dict[str, Any]) -> Rollout:
        """Sample K candidates for each query of a batch, reward them, and keep what the update needs."""
        policy = self.accelerator.unwrap_model(model)
        was_training = policy.training
        policy.eval()
        features = self._encode(policy, inputs)
        prompts = embed_prompts(policy, inputs["prompt_ids"], features)
        candidates = generate(
            policy,
            prompts,
            num_candidates=self.flags.umed_num_candidates,
            max_new_tokens=self.flags.umed_max_new_tokens,
            temperature=self.flags.umed_temperature,
            top_p=self.flags.umed_top_p,
            eos_token_id=self.tokenizer.eos_token_id,
            packed=self.packed,
        )
        questions, texts, columns = self._answered(candidates, inputs["records"])
        start_rewards(self.reward_functions, questions, texts, **columns)
        attention, passed = self._look_at_lesions(policy, prompts, candidates, inputs["records"])
        old = answer_log_probs(passed.logits, candidates, temperature=self.flags.umed_temperature).log_probs
        reference = self._reference_log_probs(policy, inputs["prompt_ids"], features, candidates)
        rewards = self._reward(candidates, inputs["records"], attention)
        policy.train(was_training)
        # Under CPU autocast the passes above have left half-precision copies of the weights without a graph: the update would
        # use them, and LoRA would get no gradient.
        torch.clear_autocast_cache()
        advantages = group_advantages(rewards, self.flags.umed_reward_coef).flatten().to(old.device)
        return Rollout(inputs["prompt_ids"], features, candidates, old, reference, advantages)

    def _encode(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        """[Q, P, D] patch features of the queries' images, read from the cache where it has them."""
        cache, found = self.train_dataset.cache, inputs["features"]
        if cache is None:
            return encode_images(policy, inputs["images"])
        self._measure({"feature_cache_hits": sum(features is not None for features in found) / len(found)})
        return cache.complete(found, inputs["features_names"], lambda: encode_images(policy, inputs["images"]))

    def _look_at_lesions(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, records: list[Any]
    ) -> tuple[Sequence[float | None], AnswerPass]:
        """Attention of each candidate on its query's lesion, and what else the same pass gives."""
        if "vision_relevance" not in self.reward_functions:
            return [None] * len(candidates.mask), answer_pass(policy, prompts, candidates, packed=self.packed)
        repeated = [record for record in records for _ in range(self.flags.umed_num_candidates)]
        rows = lesion_name_rows(self.tokenizer, candidates, repeated)
        cover = torch.stack(
            [torch.from_numpy(self._geometry(record).patch_cover(true_boxes(record))) for record in records]
        )
        values, passed = attention_on_lesion(
            policy, prompts, candidates, rows, cover, self.vrr_layers, packed=self.packed
        )
        return values.tolist(), passed

    def _reference_log_probs(
        self, policy: Any, prompt_ids: list[Tensor], features: Tensor, candidates: Candidates
    ) -> Tensor | None:
        if self.reference is None:
            return None
        with self.reference.as_reference(policy):
            passed = answer_pass(policy, embed_prompts(policy, prompt_ids, features), candidates, packed=self.packed)
            return answer_log_probs(passed.logits, candidates, temperature=self.flags.umed_temperature).log_probs

    def _answered(
        self, candidates: Candidates, records: list[Any]
    ) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """What a reward is given, one entry a candidate: questions, answers and columns."""
        repeated = [record for record in records for _ in range(self.flags.umed_num_candidates)]
        columns = {"record": repeated, "geometry": [self._geometry(record) for record in repeated]}
        questions = [record["conversations"][0]["value"] for record in repeated]
        return questions, decode_answers(self.tokenizer, candidates), columns

    def _reward(self, candidates: Candidates, records: list[Any], attention: Sequence[float | None]) -> Tensor:
        """[Q, K] rewards; every term is measured on its own."""
        k = self.flags.umed_num_candidates
        questions, texts, columns = self._answered(candidates, records)
        columns["attention_on_lesion"] = list(attention)
        values = {name: reward(questions, texts, **columns) for name, reward in self.reward_functions.items()}
        self._measure(measured_by(self.reward_functions))
        rewards = combine_rewards(
            values,
            k,
            weights=self.reward_weights,
            norm=self.flags.umed_reward_norm,
            max_normalised=[
                n for n, reward in self.reward_functions.items() if getattr(reward, "max_normalised", False)
            ],
            floor=self.flags.umed_reward_floor,
            least_maxima={n: getattr(reward, "least_maximum", 0.0) for n, reward in self.reward_functions.items()},
        )
        self._measure_rewards(values, rewards, candidates)
        self._watch(texts, columns)
        self._write_candidates(texts, values, rewards, records[0])
        return rewards

    def _in_any_process(self, said: bool) -> bool:
        told = torch.tensor([float(said)], device=self.args.device)
        return bool(self.accelerator.gather(told).max())

    def _geometry(self, record: Record) -> ImageGeometry:
        return record_geometry(record, self.image_size, self.patch_size)

    def _measure(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._measured[name].append(value)

    def _measure_rewards(
        self, values: Mapping[str, list[float | None]], rewards: Tensor, candidates: Candidates
    ) -> None:
        for name, column in values.items():
            known = [value for value in column if value is not None]
            if known:
                self._measure({f"reward/{name}": sum(known) / len(known)})
        spread = rewards.max(dim=1).values - rewards.min(dim=1).values
        ended = (candidates.token_ids.eq(self.tokenizer.eos_token_id) & candidates.mask.bool()).any(dim=1)
        self._measure(
            {
                "reward/total": rewards.mean().item(),
                "groups_without_signal": (spread < 1e-6).float().mean().item(),
                "answer_tokens": candidates.mask.sum(dim=1).float().mean().item(),
                "answers_cut_off": 1 - ended.float().mean().item(),
            }
        )

    def _watch(self, texts: list[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Show the candidates of each query to the guards."""
        k = self.flags.umed_num_candidates
        seen = [texts, columns["record"], columns["geometry"]]
        scores = [score_answer(text, record, geometry) for text, record, geometry in zip(*seen)]
        for first in range(0, len(texts), k):
            group = slice(first, first + k)
            self.guards.see(texts[group], scores[group], columns["record"][group], columns["geometry"][group])

    def _write_candidates(
        self, texts: list[str], values: Mapping[str, list[float | None]], rewards: Tensor, record: Any
    ) -> None:
        """Append the first query's candidates to ``candidates.jsonl`` in the output folder, every so many steps."""
        every = self.flags.umed_log_candidates
        if not every or self.state.global_step % every or not self.is_world_process_zero():
            return
        group = [
            {"text": texts[i], "reward": rewards[0, i].item(), **{name: column[i] for name, column in values.items()}}
            for i in range(self.flags.umed_num_candidates)
        ]
        line = {"step": self.state.global_step, "id": record["id"], "true": record["objects"], "candidates": group}
        with open(Path(self.args.output_dir) / "candidates.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add the means of what was measured since the last log, over all processes, to the trainer's own figures."""
        if "loss" in logs:
            self._measure(self.guards.figures())
            columns = [self._measured.pop(name, [float("nan")]) for name in self._measures]
            means = torch.tensor([[sum(column) / len(column) for column in columns]], device=self.args.device)
            overall = self.accelerator.gather(means).nanmean(dim=0).tolist()
            logs.update({name: mean for name, mean in zip(self._measures, overall) if mean == mean})
            if self.is_world_process_zero():
                for warning in self.guards.warnings(logs):
                    print(f"umed: WARNING: step {self.state.global_step}: {warning}", flush=True)
        super().log(logs, *rest)

"""Stage 2, Abnormal-Aware Rewarding, as a subclass of LLaVA's own trainer.

A training step takes a batch of queries, samples K candidates for each, scores them, and returns the objective as the loss; LoRA,
schedules, logging and checkpoints stay the trainer's. ``per_device_train_batch_size`` counts queries. A rollout of PPO is what
``--umed_minibatches_per_rollout`` optimizer steps take, sampled whole before the first of them; ``--umed_updates_per_rollout``
passes go over it, shuffled into new minibatches each time (GRPO's too, if one of the two is above 1). The data loader then only
counts, so that the Trainer's steps, epochs and skipped batches hold; what the passes learn from is kept here and goes into a
checkpoint that falls between them. PPO's advantages are whitened over the rollout of a process, as in TRL.

The value network's layer lies outside of the model (see `umed_plugin.value_head`); `training_step` does for its gradient what the
Trainer and DDP do for the model's. The norm that ``--max_grad_norm`` clips is the model's alone.

Run it with ``umed-run ... --umed_stage rewarding``; departures from the paper are listed in :mod:`umed_plugin.objective` and
:mod:`umed_plugin.rewards.combine`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from umed_plugin.advantages import KLCoefficient
from umed_plugin.attention import attention_on_lesion, lesion_name_rows
from umed_plugin.candidate_table import log_candidates
from umed_plugin.errors import UmedError
from umed_plugin.experience import (
    Experience,
    Samples,
    grpo_experience,
    join,
    kl_per_answer,
    minibatch_order,
    ppo_experience,
)
from umed_plugin.geometry import ImageGeometry
from umed_plugin.guards import GUARDS, VISION_RELEVANCE, Guards, vision_relevance_figures
from umed_plugin.objective import ObjectiveSettings, grpo_objective, ppo_objective
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
from umed_plugin.value_head import ValueHead

_MEASURES = (
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
_PPO_MEASURES = ("value_loss", "value_clip_fraction", "returns_mean", "advantage_std", "explained_variance")
_STATE, _PENDING = "rewarding_state.json", "rollout_{}.pt"


def _as_indices(indices: list[int]) -> dict[str, Tensor]:
    return {"indices": torch.tensor(indices)}


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
        self.vrr_heads = self.flags.vrr_head_indices(llava.config.num_attention_heads)
        flags = self.flags
        if flags.umed_feature_cache is not None:
            said = self.train_dataset.use_cache(flags.umed_feature_cache, llava.get_vision_tower())
            if self.args.process_index == 0:
                print(f"umed: {said}", flush=True)
        self.settings = ObjectiveSettings(
            flags.umed_clip_range, flags.umed_entropy_coef, flags.umed_value_coef, flags.umed_value_clip_range
        )
        self.kl_coef = KLCoefficient(flags.kl_coef(), flags.umed_kl_target, flags.umed_kl_horizon)
        self.reference = ReferencePolicy(model) if self.kl_coef.value > 0 else None
        self.value_head = ValueHead(llava.config.hidden_size).to(args.device) if flags.umed_algorithm == "ppo" else None
        # Every process logs the same names, also one whose batches had nothing to measure, or gathering would hang.
        rewards = [f"reward/{name}" for name in self.reward_functions]
        self._measures = [*rewards, *measures_of(self.reward_functions), *_MEASURES, *GUARDS, *VISION_RELEVANCE]
        self._measures += ["feature_cache_hits"] if self.train_dataset.cache is not None else []
        self._measures += _PPO_MEASURES if self.value_head is not None else ()
        self._measured: dict[str, list[float]] = defaultdict(list)
        self.guards = Guards()
        self._experience: Experience | None = None
        self._batches_seen = 0
        if val_dataset is not None:
            self.add_callback(HeldOutCurve(self, val_dataset))

    def _can_pack(self, llava: Any) -> bool:
        """Whether answers are computed beside one copy of their prompt; says so when the model cannot."""
        if not self.flags.umed_packed:
            return False
        fault = packing_fault(llava)
        if fault is not None and self.args.process_index == 0:
            print(
                f"umed: {fault}: answers are not packed. Sampling copies the prompt's cache for each answer, and under gradient "
                "checkpointing the update repeats the prompt for each. Another attention (eager, sdpa) can pack; --umed_packed "
                "False takes this as it is.",
                flush=True,
            )
        return fault is None

    def _get_train_sampler(self, *unused: Any) -> EpochSampler:
        """Queries in an order that survives resuming; they are of one length, so LLaVA's grouping by length has no use here."""
        args, flags = self.args, self.flags
        seed = args.data_seed if args.data_seed is not None else args.seed
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        rollout = step * flags.umed_minibatches_per_rollout
        if self._one_batch_rollouts:
            return EpochSampler(len(self.train_dataset), seed)
        if len(self.train_dataset) < rollout:
            raise UmedError(
                f"{len(self.train_dataset)} records do not fill one rollout of {rollout} questions (batch size x processes x "
                "accumulation steps x --umed_minibatches_per_rollout), which --umed_algorithm ppo and several updates need. "
                "Lower --per_device_train_batch_size, --gradient_accumulation_steps or --umed_minibatches_per_rollout."
            )
        self._sampler = EpochSampler(len(self.train_dataset), seed, rollout, flags.umed_updates_per_rollout)
        return self._sampler

    def get_train_dataloader(self) -> Any:
        """LLaVA's; where a rollout is more than the batch at hand, its batches only count, and no image is read for them."""
        if self._one_batch_rollouts:
            return super().get_train_dataloader()
        indices = range(len(self.train_dataset))
        size, sampler = self.args.train_batch_size, self._get_train_sampler()
        return self.accelerator.prepare(DataLoader(indices, size, sampler=sampler, collate_fn=_as_indices))

    @property
    def _one_batch_rollouts(self) -> bool:
        """Whether each batch is a rollout of its own: GRPO compares within a query, and with one update nothing is kept."""
        flags = self.flags
        passes = flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout
        return flags.umed_algorithm == "grpo" and passes == 1

    def create_optimizer(self) -> Any:
        """LLaVA's optimizer, with the value network's layer as a group of its own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer()
        if new and self.value_head is not None:
            group = {"params": list(self.value_head.parameters()), "lr": self.flags.umed_value_learning_rate}
            optimizer.add_param_group({**group, "weight_decay": 0.0})
        return optimizer

    def train(self, *positional: Any, **keywords: Any) -> Any:
        """Train, and leave the value network's layer beside what LLaVA saves at the end."""
        output = super().train(*positional, **keywords)
        if self.value_head is not None and self.args.should_save:
            self.value_head.save(Path(self.args.output_dir))
        return output

    def training_step(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """One batch forth and back; the value network's gradient begins at 0 with a step and ends as the processes' mean."""
        head = self.value_head
        if head is not None and self._batches_seen % self.args.gradient_accumulation_steps == 0:
            head.zero_grad()
        loss = super().training_step(model, inputs)
        if head is not None and self.accelerator.sync_gradients:
            for parameter in head.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any) -> Tensor:
        """The objective on a batch of queries; its candidates are sampled unless an earlier update has sampled them."""
        part = self._minibatch(model, inputs)
        samples = part.samples
        prompts = embed_prompts(self.accelerator.unwrap_model(model), samples.prompt_ids, samples.image_features)
        passed = answer_pass(model, prompts, samples.candidates, packed=self.packed)
        answers = answer_log_probs(
            passed.logits,
            samples.candidates,
            temperature=self.flags.umed_temperature,
            entropy_gradient=self.settings.entropy_coef != 0,
        )
        of_policy = (answers.log_probs, samples.log_probs, samples.reference_log_probs, answers.entropy)
        if self.value_head is None:
            loss, terms = grpo_objective(*of_policy, part.advantages, samples.mask, self.settings, part.kl_coef)
        else:
            values = self.value_head(passed.hidden)
            of_values = (values, samples.values, part.returns)
            loss, terms = ppo_objective(*of_policy, part.advantages, *of_values, samples.mask, self.settings)
        self._measure({name: value.item() for name, value in terms.items()})
        return loss

    def _minibatch(self, model: Any, inputs: dict[str, Any]) -> Experience:
        """What this batch learns from; the first batch of a rollout samples all of it."""
        flags, seen = self.flags, self._batches_seen
        self._batches_seen += 1
        if self._one_batch_rollouts:
            return self._roll_out_all(model, [inputs])
        batches = self.args.gradient_accumulation_steps * flags.umed_minibatches_per_rollout
        rollout, place = divmod(seen, batches * flags.umed_updates_per_rollout)
        if self._experience is None or place == 0:
            self._experience = self._roll_out_all(model, self._batches_of_rollout(rollout, batches))
        size = self.args.train_batch_size
        update, batch = divmod(place, batches)
        seed = (self.args.seed, rollout, update, self.args.process_index)
        order = minibatch_order(batches * size, flags.umed_minibatches_per_rollout, seed)
        return self._experience.minibatch(order[batch * size : (batch + 1) * size])

    def _batches_of_rollout(self, rollout: int, batches: int) -> Iterator[dict[str, Any]]:
        """The queries of a rollout that are this process's, batch by batch."""
        args, indices = self.args, self._sampler.rollout(rollout)
        starts = [(batch * args.world_size + args.process_index) * args.train_batch_size for batch in range(batches)]
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=[indices[start : start + args.train_batch_size] for start in starts],
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # or it would draw from the state that answers are sampled with
        )
        return map(self._prepare_inputs, loader)

    def _roll_out_all(self, model: Any, batches: Iterable[dict[str, Any]]) -> Experience:
        """Sample a rollout of one or several batches, and turn its rewards into advantages."""
        samples = join([self.roll_out(model, batch) for batch in batches])
        flags, kl_coef = self.flags, self.kl_coef.value
        if self.value_head is None:
            experience = grpo_experience(samples, kl_coef, flags.umed_reward_coef)
        else:
            experience, figures = ppo_experience(
                samples, kl_coef, flags.umed_reward_coef, flags.umed_gamma, flags.umed_gae_lambda
            )
            self._measure(figures)
        if self.reference is not None:
            kl = self.accelerator.gather(torch.tensor([kl_per_answer(samples)], device=self.args.device)).mean().item()
            self._measure({"kl_per_answer": kl, "kl_coef": kl_coef})
            self.kl_coef.update(kl, len(samples.mask) * self.args.world_size)
        return experience

    @torch.no_grad()
    def roll_out(self, model: Any, inputs: dict[str, Any]) -> Samples:
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
        values = None if self.value_head is None else self.value_head(passed.hidden)
        old = answer_log_probs(passed.logits, candidates, temperature=self.flags.umed_temperature).log_probs
        reference = self._reference_log_probs(policy, inputs["prompt_ids"], features, candidates)
        rewards = self._reward(candidates, inputs["records"], attention)
        policy.train(was_training)
        # Under CPU autocast the passes above have left half-precision copies of the weights without a graph: the update would
        # use them, and LoRA would get no gradient.
        torch.clear_autocast_cache()
        return Samples(
            inputs["prompt_ids"], features, candidates.token_ids, candidates.mask, old, reference, values, rewards
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state of this process, what else a resumed run needs; every process comes here at each checkpoint."""
        super()._save_rng_state(output_dir)
        folder, args, flags = Path(output_dir), self.args, self.flags
        if args.should_save:
            state = {"umed_algorithm": flags.umed_algorithm, "kl_coef": self.kl_coef.value}
            (folder / _STATE).write_text(json.dumps(state))
            if self.value_head is not None:
                self.value_head.save(folder)
        batches = args.gradient_accumulation_steps * flags.umed_minibatches_per_rollout * flags.umed_updates_per_rollout
        if self._experience is not None and self._batches_seen % batches:
            self._experience.save(folder / _PENDING.format(args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The model's weights, and what `_save_rng_state` wrote."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder, algorithm = Path(resume_from_checkpoint), self.flags.umed_algorithm
        state = json.loads((folder / _STATE).read_text()) if (folder / _STATE).is_file() else {}
        if state.get("umed_algorithm", algorithm) != algorithm:
            raise UmedError(
                f"{folder} was written by --umed_algorithm {state['umed_algorithm']}, and this run says {algorithm}. Resume with "
                "the algorithm that the run was started with, or give another --output_dir."
            )
        if self.value_head is not None:
            self.value_head.load(folder)
        if self.kl_coef.target is not None:
            if "kl_coef" not in state:
                raise UmedError(
                    f"{folder}: has no {_STATE}, so the KL weight that --umed_kl_target had reached is lost. Resume without "
                    "--umed_kl_target, or give another --output_dir."
                )
            self.kl_coef.value = state["kl_coef"]
        if (folder / TRAINER_STATE_NAME).is_file():
            steps = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
            self._batches_seen = steps * self.args.gradient_accumulation_steps
        pending = folder / _PENDING.format(self.args.process_index)
        if pending.is_file():
            self._experience = Experience.load(pending, self.args.device)

    def _encode(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        """[Q, P, D] patch features of the queries' images, read from the cache where it has them."""
        cache, found = self.train_dataset.cache, inputs["features"]
        if cache is None:
            # The tower's output lies in memory otherwise than what is read from a cache, and bf16 kernels round by that.
            return encode_images(policy, inputs["images"]).contiguous()
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
            policy,
            prompts,
            candidates,
            rows,
            cover,
            self.vrr_layers,
            heads=self.vrr_heads,
            sink_ratio=self.flags.umed_vrr_mask_sinks,
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
        if "vision_relevance" in self.reward_functions:
            covers = [place.patch_cover(true_boxes(record)).mean() for record, place in zip(*seen[1:])]
            overlaps = [score.set_iou for score in scores]
            self._measure(vision_relevance_figures(columns["attention_on_lesion"], covers, overlaps))

    def _write_candidates(
        self, texts: list[str], values: Mapping[str, list[float | None]], rewards: Tensor, record: Any
    ) -> None:
        """Show the first query's candidates, every so many steps."""
        every = self.flags.umed_log_candidates
        if not every or self.state.global_step % every or not self.is_world_process_zero():
            return
        terms = {name: column[: self.flags.umed_num_candidates] for name, column in values.items()}
        log_candidates(
            self.state.global_step,
            record,
            texts[: self.flags.umed_num_candidates],
            rewards[0].tolist(),
            terms,
            self.args.output_dir,
            self.callback_handler.callbacks,
        )

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

"""Stage 2, Abnormal-Aware Rewarding, as a subclass of LLaVA's own trainer.

A training step takes a batch of queries, has `umed_plugin.training.experience_maker` sample and reward K candidates for each,
and returns the objective as the loss; LoRA, schedules, logging and checkpoints stay the trainer's.
``per_device_train_batch_size`` counts queries. A rollout of PPO is what ``--umed_minibatches_per_rollout`` optimizer steps
take, sampled whole before the first of them; ``--umed_updates_per_rollout`` passes go over it, shuffled into new minibatches
each time (GRPO's too, if one of the two is above 1). The data loader then only counts, so that the Trainer's steps, epochs
and skipped batches hold; what the passes learn from is kept here and goes into a checkpoint that falls between them. PPO's
advantages are whitened over the rollout of a process, as in TRL.

The value network's layer lies outside of the model (see `umed_plugin.training.value_head`); `training_step` does for its
gradient what the Trainer and DDP do for the model's. ``--max_grad_norm`` bounds the norm of each by itself; TRL takes one
norm over both.

Run it with ``umed-run ... --umed_stage rewarding``; departures from the paper are listed in
:mod:`umed_plugin.training.objective` and :mod:`umed_plugin.rewards.combine`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from umed_plugin.errors import UmedError
from umed_plugin.model.forward import answer_log_probs, answer_pass, base_llava, embed_prompts
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.rewards import make_rewards
from umed_plugin.training.experience import Experience, minibatch_order
from umed_plugin.training.experience_maker import ExperienceMaker
from umed_plugin.training.objective import ObjectiveSettings, grpo_objective, ppo_objective
from umed_plugin.training.sampler import EpochSampler
from umed_plugin.training.step_metrics import StepMetrics, metric_names
from umed_plugin.training.stopping import StopForReward
from umed_plugin.training.validation import HeldOutValidation
from umed_plugin.training.value_head import ValueHead

_STATE, _PENDING = "rewarding_state.json", "rollout_{}.pt"


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, also that of Llama's and Mistral's attention: the update must see the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # no module but a number of the function's
            module.attention_dropout = 0.0


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
        switch_off_dropout(model)
        super().__init__(model=model, tokenizer=tokenizer, args=args, **keywords)
        self.flags = flags = args.umed
        llava = base_llava(model)
        rewards = make_rewards(flags, args.output_dir)
        self.measures = StepMetrics(self, flags, metric_names(flags, rewards))
        self.add_callback(StopForReward(rewards, self.measures.on_any_rank))
        if flags.umed_feature_cache is not None:
            with gathered_parameters(llava.get_vision_tower()):
                said = self.train_dataset.use_cache(flags.umed_feature_cache, llava.get_vision_tower())
            if self.args.process_index == 0:
                print(f"umed: {said}", flush=True)
        self.value_head = ValueHead(llava.config.hidden_size).to(args.device) if flags.umed_algorithm == "ppo" else None
        cache = self.train_dataset.cache
        self.maker = ExperienceMaker(model, tokenizer, flags, args, rewards, self.value_head, cache, self.measures)
        self.settings = ObjectiveSettings(
            flags.umed_clip_range, flags.umed_entropy_coef, flags.umed_value_coef, flags.umed_value_clip_range
        )
        self._experience: Experience | None = None
        self._batches_seen = 0
        if val_dataset is not None:
            self.add_callback(HeldOutValidation(self, val_dataset))

    def _get_train_sampler(self, *unused: Any) -> EpochSampler:
        """Queries in an order that survives resuming; they are of one length, so LLaVA's grouping by length has no use here."""
        args, flags = self.args, self.flags
        seed = args.data_seed if args.data_seed is not None else args.seed
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        rollout = step * flags.umed_minibatches_per_rollout
        if self.flags.rollout_is_one_batch():
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
        if self.flags.rollout_is_one_batch():
            return super().get_train_dataloader()
        indices = range(len(self.train_dataset))
        size, sampler = self.args.train_batch_size, self._get_train_sampler()
        return self.accelerator.prepare(DataLoader(indices, size, sampler=sampler, collate_fn=_as_indices))

    @property
    def _batches_per_rollout(self) -> int:
        """Batches of a process from one sampling to the next."""
        flags = self.flags
        steps = flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout
        return steps * self.args.gradient_accumulation_steps

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

    def training_step(self, model: Any, inputs: dict[str, Any], *unused: Any) -> Tensor:
        """One batch forth and back; the value network's gradient begins a step at 0 and ends as the processes' mean, clipped."""
        head = self.value_head
        if head is not None and self._batches_seen % self.args.gradient_accumulation_steps == 0:
            head.zero_grad()
        loss = super().training_step(model, inputs)
        if head is not None and self.accelerator.sync_gradients:
            for parameter in head.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if self.args.max_grad_norm is not None and self.args.max_grad_norm > 0:
                # Under fp16 the gradients are still multiplied by the scale of the loss.
                scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
                nn.utils.clip_grad_norm_(head.parameters(), self.args.max_grad_norm * scale)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any) -> Tensor:
        """The objective on a batch of queries; its candidates are sampled unless an earlier update has sampled them."""
        part = self._minibatch(model, inputs)
        samples = part.samples
        prompts = embed_prompts(self.accelerator.unwrap_model(model), samples.prompt_ids, samples.image_features)
        passed = answer_pass(model, prompts, samples.candidates, packed=self.maker.packed)
        answers = answer_log_probs(
            passed.logits,
            samples.candidates,
            temperature=self.flags.umed_temperature,
            entropy_gradient=self.settings.entropy_coef != 0,
        )
        old = samples.log_probs
        if old is None:
            old = answers.log_probs.detach()
            self.maker.steer_kl(samples, old)
        of_policy = (answers.log_probs, old, samples.reference_log_probs, answers.entropy)
        if self.value_head is None:
            loss, terms = grpo_objective(*of_policy, part.advantages, samples.mask, self.settings, part.kl_coef)
        else:
            values = self.value_head(passed.hidden)
            of_values = (values, samples.values, part.returns)
            loss, terms = ppo_objective(*of_policy, part.advantages, *of_values, samples.mask, self.settings)
        self.measures.add(dict(zip(terms, torch.stack(list(terms.values())).tolist())))
        return loss

    def _minibatch(self, model: Any, inputs: dict[str, Any]) -> Experience:
        """What this batch learns from; the first batch of a rollout samples all of it."""
        flags, seen = self.flags, self._batches_seen
        policy = self.accelerator.unwrap_model(model)
        self._batches_seen += 1
        if self.flags.rollout_is_one_batch():
            return self.maker.make(policy, [inputs])
        batches = self.args.gradient_accumulation_steps * flags.umed_minibatches_per_rollout
        rollout, place = divmod(seen, self._batches_per_rollout)
        if self._experience is None or place == 0:
            self._experience = self.maker.make(policy, self._batches_of_rollout(rollout, batches))
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

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state of this process, what else a resumed run needs; every process comes here at each checkpoint."""
        super()._save_rng_state(output_dir)
        folder, args = Path(output_dir), self.args
        if args.should_save:
            state = {"umed_algorithm": self.flags.umed_algorithm, "kl_coef": self.maker.kl_coef.value}
            (folder / _STATE).write_text(json.dumps(state))
            if self.value_head is not None:
                self.value_head.save(folder)
        if self._experience is not None and self._batches_seen % self._batches_per_rollout:
            self._experience.save(folder / _PENDING.format(args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Optimizer and schedule, and what `_save_rng_state` wrote; every resumed run comes here, under DeepSpeed too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, algorithm = Path(checkpoint), self.flags.umed_algorithm
        state = json.loads((folder / _STATE).read_text()) if (folder / _STATE).is_file() else {}
        if state.get("umed_algorithm", algorithm) != algorithm:
            raise UmedError(
                f"{folder} was written by --umed_algorithm {state['umed_algorithm']}, and this run says {algorithm}. Resume with "
                "the algorithm that the run was started with, or give another --output_dir."
            )
        if self.value_head is not None:
            self.value_head.load(folder)
        if self.maker.kl_coef.target is not None:
            if "kl_coef" not in state:
                raise UmedError(
                    f"{folder}: has no {_STATE}, so the KL weight that --umed_kl_target had reached is lost. Resume without "
                    "--umed_kl_target, or give another --output_dir."
                )
            self.maker.kl_coef.value = state["kl_coef"]
        if (folder / TRAINER_STATE_NAME).is_file():
            steps = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
            self._batches_seen = steps * self.args.gradient_accumulation_steps
        if self._batches_seen % self._batches_per_rollout:
            self._load_pending(folder)

    def _load_pending(self, folder: Path) -> None:
        """What this process was learning from, unless a process has lost it: then all of them sample anew, as they gather."""
        file = folder / _PENDING.format(self.args.process_index)
        if not self.measures.on_any_rank(not file.is_file()):
            self._experience = Experience.load(file, self.args.device)
        elif self.args.process_index == 0:
            print(
                f"umed: WARNING: {folder} lies between the updates of a rollout, but not each of the {self.args.world_size} "
                f"processes finds its {_PENDING.format('N')} there: all sample the rollout anew, so this run departs from the "
                "one that was stopped.",
                flush=True,
            )

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add the means of what was measured since the last log, over all processes, to the trainer's own figures."""
        if "loss" in logs:
            logs.update(self.measures.means())
            self.measures.warn(logs)
        super().log(logs, *rest)

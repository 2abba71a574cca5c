"""Stage 2, Abnormal-Aware Rewarding, as a subclass of LLaVA's own trainer.

A training step takes a batch of queries. `umed_plugin.training.experience_maker` samples and rewards K candidates for each, and
computes advantages, and `umed_plugin.training.rollouts` says which of them a batch learns from. `RewardingTrainer.compute_loss`
returns the objective as the loss. LoRA, schedules, logging and checkpoints stay the trainer's. ``per_device_train_batch_size``
counts queries.

The value network's layer lies outside the model (see `umed_plugin.training.value_head`). `RewardingTrainer.training_step` does
for its gradient what the Trainer and DDP do for the model's. ``--max_grad_norm`` bounds the norm of each separately; TRL takes
one norm over both.

Run it with ``umed-run ... --umed_stage rewarding``. Departures from the paper are listed in `umed_plugin.training.objective` and
`umed_plugin.rewards.combine`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from umed_plugin.errors import UmedError, note, warn
from umed_plugin.files import failed_write
from umed_plugin.model.forward import answer_pass, base_llava, embed_prompts
from umed_plugin.model.sampling import NotFiniteError
from umed_plugin.model.server_comparison import ServerComparison
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.remote.rollout_server import RolloutServerError
from umed_plugin.rewards import load_reward_states, make_rewards, remarks_on_records, reward_states
from umed_plugin.training.candidate_log import CandidateLogStart
from umed_plugin.training.experience import Experience
from umed_plugin.training.experience_maker import ExperienceMaker
from umed_plugin.training.finite_weights import broken_run, has_broken_weights
from umed_plugin.training.importance import importance_metrics, importance_weights
from umed_plugin.training.objective import (
    ObjectiveSettings,
    PolicyTensors,
    ValueTensors,
    grpo_objective,
    ppo_objective,
)
from umed_plugin.training.out_of_memory import learning_remedy, remedy_for_memory
from umed_plugin.training.query_reader import as_indices
from umed_plugin.training.rewarding_state import load_further, load_kl_coef, load_rewards, save_state
from umed_plugin.training.rollouts import Rollouts
from umed_plugin.training.run_precision import precision_of
from umed_plugin.training.run_settings import stored_settings
from umed_plugin.training.sampler import EpochSampler
from umed_plugin.training.schedule_check import ScheduleCheck
from umed_plugin.training.start_check import NOT_COMPARED, StartCheck
from umed_plugin.training.step_metrics import StepMetrics, metric_names, takes_metrics
from umed_plugin.training.stopping import RewardError, StopForReward
from umed_plugin.training.validation import HeldOutValidation
from umed_plugin.training.value_head import ValueHead


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, also in Llama's and Mistral's attention: the update must see the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # not a module, but an argument of a function
            module.attention_dropout = 0.0


class RewardingTrainer(LLaVATrainer):
    """LLaVA's trainer with the objective of Abnormal-Aware Rewarding.

    Args:
        model: a LLaVA model, with or without a LoRA adapter.
        tokenizer: its tokenizer.
        args: LLaVA's training arguments; ``args.umed`` holds the flags.
        val_dataset: held-out queries for ``--umed_val_every``.
        keywords: the rest of the data module, and whatever else ``transformers.Trainer`` takes.
    """

    def __init__(self, model: Any, tokenizer: Any, args: Any, val_dataset: Any = None, **keywords: Any) -> None:
        switch_off_dropout(model)
        super().__init__(model=model, tokenizer=tokenizer, args=args, **keywords)
        self.flags = flags = args.umed
        llava = base_llava(model)
        records = self.train_dataset.list_data_dict
        rewards = make_rewards(flags, args.output_dir, records)
        for sentence in remarks_on_records(rewards, records):
            if args.process_index == 0:
                note(sentence)
        if args.process_index == 0 and not flags.umed_val_every:
            note(NOT_COMPARED)
        self.metrics = StepMetrics(self, flags, metric_names(flags, rewards))
        self.add_callback(StopForReward(rewards, self.metrics.on_any_rank))
        if flags.umed_feature_cache is not None:
            with gathered_parameters(llava.get_vision_tower()):
                summary = self.train_dataset.use_feature_cache(flags.umed_feature_cache, llava.get_vision_tower())
            if self.args.process_index == 0:
                note(summary)
        self.value_head = ValueHead(llava.config.hidden_size).to(args.device) if flags.umed_algorithm == "ppo" else None
        cache = self.train_dataset.feature_cache
        self.maker = ExperienceMaker(model, tokenizer, flags, args, rewards, self.value_head, cache, self.metrics)
        self.settings = ObjectiveSettings(
            flags.umed_clip_range,
            flags.umed_entropy_coef,
            flags.umed_value_coef,
            flags.umed_value_clip_range,
            flags.umed_clip_range_high,
            flags.umed_loss_aggregation,
            flags.umed_max_new_tokens,
        )
        self.rollouts = Rollouts(self)
        self._server = ServerComparison(
            str(flags.umed_rollout_server), flags.umed_rollout_max_difference, "--umed_rollout_max_difference"
        )
        # What `_moved_by_steps` was when the optimizer step of this number began; of the one that failed, where one did.
        self._before_step: tuple[int, Any] = (-1, None)
        self._stopped_at: Any = None
        self.add_callback(StartCheck(self))
        self.add_callback(ScheduleCheck(flags))
        self.add_callback(CandidateLogStart())
        if val_dataset is not None:
            self.add_callback(HeldOutValidation(self, val_dataset))

    def _get_train_sampler(self, *unused: Any) -> EpochSampler:
        """Queries in an order that survives resuming. They have equal length, so LLaVA's grouping by length is not needed."""
        return self.rollouts.new_sampler()

    def get_train_dataloader(self) -> Any:
        """A data loader that only says which records come next; no image is read for its batches."""
        indices, args = range(len(self.train_dataset)), self.args
        sampler = self._get_train_sampler()
        loader = DataLoader(
            indices,
            args.train_batch_size,
            sampler=sampler,
            collate_fn=as_indices,
            drop_last=args.dataloader_drop_last,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self) -> Any:
        """LLaVA's optimizer, with the value network's layer as a parameter group of its own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer()
        if new and self.value_head is not None:
            group = {"params": list(self.value_head.parameters()), "lr": self.flags.umed_value_learning_rate}
            optimizer.add_param_group({**group, "weight_decay": 0.0})
        return optimizer

    def train(self, *positional: Any, **keywords: Any) -> Any:
        """Train, and save the value network's layer beside what LLaVA saves at the end."""
        try:
            output = super().train(*positional, **keywords)
        except (RolloutServerError, RewardError) as error:
            raise UmedError(
                f"training stopped after step {self.state.global_step}: {error} {self._save_stopped()}"
            ) from None
        except NotFiniteError as error:
            raise UmedError(broken_run(self, str(error))) from None
        finally:
            self.maker.engine.close()
        self.rollouts.reader.close()
        if self.value_head is not None and self.args.should_save:
            self.value_head.save(Path(self.args.output_dir))
        return output

    def _save_stopped(self) -> str:
        """Save what was learnt before the step that failed, on all ranks; returns a sentence that names the checkpoint."""
        step = self.state.global_step
        if step == 0:
            return "Nothing was learnt yet."
        if has_broken_weights(self):
            return "No checkpoint was saved: the trained weights are NaN or infinite. Lower --learning_rate."
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not (folder / TRAINER_STATE_NAME).is_file():
            self._stopped_at = self._moved_until(step)
            try:
                self._save_checkpoint(self.model_wrapped, None)
            except Exception as error:  # the full disk, of several libraries, that may have stopped the run
                if (reason := failed_write(error)) is None:
                    raise
                return f"No checkpoint of this step could be saved either: {reason}."
        return f"Saved: {folder}. The same command goes on from there."

    def training_step(self, model: Any, inputs: dict[str, Any], *unused: Any) -> Tensor:
        """One batch, forward and backward. DDP and the Trainer do not know the value head: its gradient is handled here."""
        head = self.value_head
        # The first batch of an accumulation starts from zero, as the model's gradient does.
        if head is not None and self.rollouts.begins_step:
            head.zero_grad()
        if self._before_step[0] != self.state.global_step:
            self._before_step = self.state.global_step, self._moved_by_steps()
        remedy = learning_remedy(self.flags)
        with remedy_for_memory("learning from sampled answers", remedy):
            loss = super().training_step(model, inputs)
        # The last one averages over ranks and clips; then the Trainer calls the optimizer, which has the head's parameters.
        if head is not None and self.accelerator.sync_gradients:
            for parameter in head.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if self.args.max_grad_norm is not None and self.args.max_grad_norm > 0:
                # Under fp16 the gradients are still multiplied by the loss scale.
                scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
                nn.utils.clip_grad_norm_(head.parameters(), self.args.max_grad_norm * scale)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **unused: Any) -> Tensor:
        """The objective on a batch of queries; their rollout is sampled first unless an earlier batch has sampled it."""
        # Sampling and scoring call parts of the model, which accelerate does not wrap. Without this, the policy that samples
        # would compute in another precision than the one that learns.
        with precision_of(self.args):
            return self._objective(model, inputs)

    def _objective(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        experience = self.rollouts.minibatch(self.accelerator.unwrap_model(model), inputs["indices"].tolist())
        samples = experience.samples

        # The only pass with gradient: over the candidates, through projector and language model.
        prompts = embed_prompts(self.accelerator.unwrap_model(model), samples.prompt_ids, samples.image_features)
        scoring = replace(self.maker.scoring, entropy_gradient=self.settings.entropy_coef != 0)
        outputs = answer_pass(model, prompts, samples.candidates, packed=self.maker.packed, scoring=scoring)
        answers = outputs.scores
        assert answers is not None

        # With a single update per rollout, the policy is still the one that sampled: this pass gives the old log-probabilities,
        # and the ratio is exactly 1. Those of another pass would differ by rounding.
        old_log_probs = answers.log_probs.detach() if self.flags.learnt_from_once() else samples.log_probs
        assert old_log_probs is not None
        if samples.log_probs is None:
            self.maker.measure_kl(samples, old_log_probs)
            if self.rollouts.all_handed_out:
                self.maker.adapt_kl()
        policy = PolicyTensors(answers.log_probs, old_log_probs, samples.reference_log_probs, answers.entropy)

        mask, step = samples.loss_mask, self.rollouts.step_size
        advantages = self._for_this_policy(experience, old_log_probs)
        if self.value_head is None:
            loss, terms = grpo_objective(policy, advantages, mask, self.settings, experience.kl_coef, step)
        else:
            assert samples.values is not None and experience.returns is not None
            value = ValueTensors(self.value_head(outputs.hidden), samples.values, experience.returns)
            loss, terms = ppo_objective(policy, value, advantages, mask, self.settings, step)
        # One transfer for all terms: each waits for the accelerator.
        self.metrics.add(dict(zip(terms, torch.stack(list(terms.values())).tolist())))
        return loss

    def _for_this_policy(self, experience: Experience, old_log_probs: Tensor) -> Tensor:
        """[N, T] advantages, times the importance weights of answers that a rollout server has sampled.

        Raises:
            RolloutServerError: the server's probabilities are not those of this policy, on all ranks.
        """
        samples, flags = experience.samples, self.flags
        if samples.sampled_log_probs is None:
            return experience.advantages
        own, sampled = old_log_probs, samples.sampled_log_probs
        measured = importance_metrics(
            own, sampled, samples.mask, flags.umed_importance_cap, samples.log_probs_without_adapter
        )
        self.metrics.add(measured)
        fault = self._server.fault(
            int(samples.mask.sum()),
            measured.get("server_difference", 0.0),
            measured.get("server_difference_without_adapter"),
        )
        if self.metrics.on_any_rank(fault is not None):
            raise RolloutServerError(fault or "the rollout server's model differs from another process's policy.")
        return experience.advantages * importance_weights(own, sampled, flags.umed_importance_cap)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint, for which every rank calls this, also what else a resumed run needs."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:  # the result of the run
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # the first rank may not have come to it yet
        kl_coef, states, further = self._stopped_at or self._moved_by_steps()
        if self.args.should_save:
            save_state(folder, self.flags.umed_algorithm, kl_coef, states, further)
            if self.value_head is not None:
                self.value_head.save(folder)
        self.rollouts.save(folder)

    def _moved_by_steps(self) -> tuple[float, dict[str, Any], int]:
        """What a step changes beside the weights: the KL's weight, the rewards' states, the number of further queries taken.

        Raises:
            RewardError: a reward cannot say its state. All ranks call, and all raise.
        """
        states = {}
        if any(hasattr(reward, "state") for reward in self.maker.rewards.values()):
            with self.maker.rewards_agreed():
                states = reward_states(self.maker.rewards)
        return self.maker.kl_coef.value, states, self.rollouts.further.taken

    def _moved_until(self, step: int) -> tuple[float, dict[str, Any], int]:
        """`_moved_by_steps` for a checkpoint of a step behind which the run failed; as it was before, where a state fails."""
        before, moved = self._before_step
        if before != step:
            with suppress(RewardError):
                return self._moved_by_steps()
        return moved

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and schedule, and what `save_model` wrote; every resumed run calls this, also under DeepSpeed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, kl_coef = Path(checkpoint), self.maker.kl_coef
        adapted = kl_coef.target is not None and not self._begins_with_another_kl_coef(folder)
        value = load_kl_coef(folder, self.flags.umed_algorithm, needed=adapted)
        lost = load_reward_states(self.maker.rewards, load_rewards(folder))
        if lost and self.args.process_index == 0:
            warn(f"{folder} has no state of the rewards {', '.join(lost)}: they begin as in a new run.")
        self.rollouts.further.taken = load_further(folder)
        if self.value_head is not None:
            self.value_head.load(folder)
        if adapted and value is not None:
            kl_coef.value = value
        # The number of steps says where in a rollout the checkpoint lies.
        state = folder / TRAINER_STATE_NAME
        self.rollouts.resume(folder, TrainerState.load_from_json(str(state)).global_step if state.is_file() else None)

    def _begins_with_another_kl_coef(self, folder: Path) -> bool:
        """Whether a change of --umed_kl_coef was accepted: the KL's weight begins there, not where the stopped run left it."""
        before = stored_settings(folder) or {}
        return bool(before.get("umed_kl_coef", self.flags.umed_kl_coef) != self.flags.umed_kl_coef)

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add the metrics' means since the last log, over all ranks, to the trainer's own metrics."""
        if takes_metrics(logs, self.state):
            logs.update(self.metrics.means())
            self.metrics.warn(logs)
        super().log(logs, *rest)

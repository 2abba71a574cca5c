"""Which sampled answers each batch of the Trainer learns from.

A rollout is sampled whole before the first batch that learns from it. In GRPO it holds the batches of one optimizer step (at an
epoch's end: those that are left), and nothing of it is kept after the step. In PPO it feeds ``--umed_minibatches_per_rollout``
optimizer steps, and there are ``--umed_updates_per_rollout`` epochs over it, each shuffled into new minibatches. (GRPO works the
same if one of the two is above 1.) Such a rollout goes into a checkpoint that falls between its updates. PPO's advantages are
whitened over the rollout of one rank, as in TRL.

The Trainer's data loader only yields indices, which keeps its steps, epochs and skipped batches right. The images of a whole
rollout are read by `umed_plugin.training.query_reader`.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, note, warn
from umed_plugin.training.dynamic_sampling import Dealing, FurtherQueries
from umed_plugin.training.experience import Experience, Samples, minibatch_order
from umed_plugin.training.objective import StepSize
from umed_plugin.training.query_reader import QueryReader, rank_batches
from umed_plugin.training.rewarding_state import rollout_file
from umed_plugin.training.sampler import EpochSampler


class Rollouts:
    """Samples the rollouts of a run, and hands each batch its part.

    Args:
        trainer: a `umed_plugin.training.trainer.RewardingTrainer`, whose maker samples.

    Attributes:
        reader: reads the queries.
        further: the queries of ``--umed_dynamic_sampling``.
        step_size: of the optimizer step that the last batch belongs to, over all ranks; None before the first.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args, self._flags = trainer, trainer.args, trainer.flags
        self._experience: Experience | None = None
        self._said_left_out = False
        self._batches_seen = 0  # of this rank since the run began, also before it was resumed
        self._step_begun, self._batches_in_step = -1, 0
        self._sampled_ahead: deque[tuple[list[int], Experience]] = deque()
        self.step_size: StepSize | None = None
        self.reader = QueryReader(
            trainer.train_dataset,
            trainer.data_collator,
            self._args.dataloader_num_workers,
            self._batches_of_epoch,
            numbered=self._flags.umed_augment,
        )
        self.further = FurtherQueries(
            trainer.train_dataset,
            trainer.data_collator,
            Dealing(self._seed_of_order, self._args.process_index, self._args.world_size),
            numbered=self._flags.umed_augment,
        )

    @property
    def _seed_of_order(self) -> int:
        """The seed of the order of the data."""
        seed: int = self._args.data_seed if self._args.data_seed is not None else self._args.seed
        return seed

    def new_sampler(self) -> EpochSampler:
        """The order of the queries, from the first epoch on.

        Raises:
            UmedError: the records do not fill one rollout.
        """
        args, flags, seed = self._args, self._flags, self._seed_of_order
        queries = len(self._trainer.train_dataset)
        step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        rollout = step * flags.umed_minibatches_per_rollout
        if flags.rollout_is_any_step():
            self._sampler = EpochSampler(queries, seed)
            return self._sampler
        if queries < rollout:
            raise UmedError(
                f"{queries} records do not fill one rollout of {rollout} queries (batch size x processes x "
                "accumulation steps x --umed_minibatches_per_rollout), which --umed_algorithm ppo and several updates need. "
                "Lower --per_device_train_batch_size, --gradient_accumulation_steps or --umed_minibatches_per_rollout."
            )
        self._say_left_out(queries, rollout)
        self._sampler = EpochSampler(queries, seed, rollout, flags.umed_updates_per_rollout)
        return self._sampler

    def _say_left_out(self, queries: int, rollout: int) -> None:
        """Say once how many records an epoch leaves out, because they do not fill a rollout of this many."""
        if queries % rollout and not self._said_left_out and self._args.process_index == 0:
            note(
                f"each epoch leaves out {queries % rollout} of {queries} records, others each time: a rollout takes {rollout} "
                "(batch size x processes x accumulation steps x --umed_minibatches_per_rollout)."
            )
        self._said_left_out = True

    def _batches_of_epoch(self, epoch: int) -> list[list[int]]:
        """All batches that this rank reads in an epoch over the data."""
        args = self._args
        return rank_batches(
            self._sampler.reading_order(epoch),
            args.train_batch_size,
            args.world_size,
            args.process_index,
            args.dataloader_drop_last,
        )

    @property
    def _batches_per_epoch(self) -> int:
        """Batches of a rank in one epoch over a rollout."""
        return self._args.gradient_accumulation_steps * self._flags.umed_minibatches_per_rollout

    @property
    def _batches_per_rollout(self) -> int:
        """Batches of a rank from one sampling to the next."""
        return self._flags.umed_updates_per_rollout * self._batches_per_epoch

    def minibatch(self, policy: Any, indices: list[int]) -> Experience:
        """What the next batch learns from. The first batch of a rollout samples all of it.

        Args:
            policy: unwrapped.
            indices: of the batch's queries.
        """
        seen = self._batches_seen
        self._batches_seen += 1
        if self._flags.rollout_is_any_step():
            return self._batch_of_step(policy, indices)
        return self._batch_of_rollout(policy, seen)

    @property
    def begins_step(self) -> bool:
        """Whether the next batch is the first of an optimizer step."""
        return self._batches_seen % self._args.gradient_accumulation_steps == 0

    @property
    def all_handed_out(self) -> bool:
        """Whether no batch that was sampled for the optimizer step is left."""
        return not self._sampled_ahead

    def _batch_of_step(self, policy: Any, indices: list[int]) -> Experience:
        """The batch with these indices. The first one of an optimizer step samples all that the step will take."""
        if self._step_begun != self._trainer.state.global_step:
            self._step_begun, self._batches_in_step = self._trainer.state.global_step, 0
            self._sampled_ahead.clear()
        if not self._sampled_ahead or self._sampled_ahead[0][0] != indices:
            accumulation = self._args.gradient_accumulation_steps
            left_in_step = accumulation - self._batches_in_step % accumulation
            self._sampled_ahead = self._sample_ahead(policy, indices, left_in_step)
        self._batches_in_step += 1
        return self._sampled_ahead.popleft()[1]

    def _sample_ahead(self, policy: Any, indices: list[int], count: int) -> deque[tuple[list[int], Experience]]:
        """Sample the batch with these indices and those that follow in this epoch, ``count`` at most."""
        epoch = self._sampler.epochs_begun - 1
        first = self.reader.position(epoch, indices)
        batches = self._prepared(self.reader.read(epoch, first, count))
        whole = self._trainer.maker.make(policy, batches, self._further_batches)
        self._weigh_step(whole.samples, len(batches))
        coming: deque[tuple[list[int], Experience]] = deque()
        start = 0
        for batch, name in zip(batches, self.reader.plan(epoch)[first:]):
            size = len(batch["records"])
            coming.append((name, whole.minibatch(range(start, start + size))))
            start += size
        return coming

    def _batch_of_rollout(self, policy: Any, seen: int) -> Experience:
        """Batch number ``seen`` of this run, where a rollout feeds a fixed number of batches."""
        rollout, batch_in_rollout = divmod(seen, self._batches_per_rollout)
        if self._experience is None or batch_in_rollout == 0:
            data_epoch, number = self._sampler.rollout(rollout)
            batches = self.reader.read(data_epoch, number * self._batches_per_epoch, self._batches_per_epoch)
            self._experience = self._trainer.maker.make(policy, self._prepared(batches), self._further_batches)
        # Which queries come next follows from counters and seed alone: a resumed run takes the same ones.
        size, accumulation = self._args.train_batch_size, self._args.gradient_accumulation_steps
        epoch, batch = divmod(batch_in_rollout, self._batches_per_epoch)
        seed = (self._args.seed, rollout, epoch, self._args.process_index)
        order = minibatch_order(self._batches_per_epoch * size, self._flags.umed_minibatches_per_rollout, seed)
        if batch % accumulation == 0:
            step = self._experience.minibatch(order[batch * size : (batch + accumulation) * size])
            self._weigh_step(step.samples, accumulation)
        return self._experience.minibatch(order[batch * size : (batch + 1) * size])

    def _further_batches(self, count: int) -> list[dict[str, Any]]:
        """``count`` further queries of this rank, in batches that are scored as others are."""
        return self._prepared(self.further.take(count, self._args.train_batch_size))

    def _prepared(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches on the policy's device."""
        return [self._trainer._prepare_inputs(batch) for batch in batches]

    def _weigh_step(self, samples: Samples, batches: int) -> None:
        """Set the size of an average micro-batch of the optimizer step, over all ranks, from this rank's samples of the step."""
        own = StepSize.of(samples.loss_mask)
        answers, tokens = self._trainer.metrics.means_over_ranks(own.answers / batches, own.tokens / batches)
        self.step_size = StepSize(answers, tokens)

    def save(self, folder: Path) -> None:
        """Write what this rank is learning from into a checkpoint, if the checkpoint lies between the updates of a rollout.

        What counts is what was learnt: a step that fails has begun a batch.
        """
        learnt = self._trainer.state.global_step * self._args.gradient_accumulation_steps
        if self._experience is not None and learnt % self._batches_per_rollout:
            self._experience.save(rollout_file(folder, self._args.process_index))

    def resume(self, folder: Path, steps: int | None) -> None:
        """Go on behind the optimizer steps of a checkpoint. In between, the answers of a rollout are read, not sampled anew.

        Args:
            folder: the checkpoint.
            steps: that it was saved behind; None if it does not say.

        Raises:
            UmedError: its rollout is of another shape than this run's.
        """
        if steps is not None:
            self._batches_seen = steps * self._args.gradient_accumulation_steps
        if self._batches_seen % self._batches_per_rollout:
            self._load(folder)

    def _load(self, folder: Path) -> None:
        """Load what this rank was learning from. If any rank has lost its file, all sample anew, because they gather."""
        file = rollout_file(folder, self._args.process_index)
        if not self._trainer.metrics.on_any_rank(not file.is_file()):
            self._experience = Experience.load(file, self._args.device)
            self._check_shape(file, self._experience)
        elif self._args.process_index == 0:
            warn(
                f"{folder} lies between the updates of a rollout, but not each of the {self._args.world_size} processes finds "
                f"its {rollout_file(folder, 'N').name} there. All processes sample the rollout anew, so this run departs from "
                "the stopped one."
            )

    def _check_shape(self, file: Path, experience: Experience) -> None:
        """Refuse a rollout of another shape: checkpoints before settings were stored cannot be compared flag by flag."""
        queries, candidates = experience.samples.rewards.shape
        needed = self._batches_per_epoch * self._args.train_batch_size
        if (queries, candidates) != (needed, self._flags.umed_num_candidates):
            raise UmedError(
                f"{file}: is a rollout of {queries} queries with {candidates} candidates each, but this run has {needed} with "
                f"{self._flags.umed_num_candidates}. Resume with the --per_device_train_batch_size, "
                "--gradient_accumulation_steps, --umed_minibatches_per_rollout and --umed_num_candidates with which the run was "
                "started, or choose another --output_dir."
            )

"""Before the first step of stage 2: does the checkpoint write boxes at all?

Rewards for boxes are 0 for every answer of a checkpoint that writes none. All answers to a question are then equally good, and
hours of training teach nothing. So answers are sampled to a few training studies with a lesion, as the run samples them. If none
has a box, the run ends with a message. The random state is left as it was: a run is the same with and without the check.

Where the boxes are nearly all right, stage 1 may know the training studies by heart. `umed_plugin.rewards.guards` tells that by a
held-out validation. A run without one is told that nothing compares.

How to run: by itself before stage 2, if a reward looks at boxes (`BOX_REWARDS`) and the run has 20 steps or more.
``--umed_start_check 16`` checks a shorter one too, and ``--umed_start_check 0`` none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from umed_plugin.data.image_files import evenly
from umed_plugin.errors import UmedError, note, warn
from umed_plugin.flags.names import BOX_REWARDS
from umed_plugin.grounding.scoring import score_answer
from umed_plugin.model.forward import decode_answers, embed_prompts, encode_images
from umed_plugin.model.sampling import generate
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.terminal.text import one_line
from umed_plugin.training.finite_weights import answering
from umed_plugin.training.rewarding_data import collate_queries
from umed_plugin.training.run_precision import precision_of

STUDIES = 16
FEWEST_STEPS = 20  # shorter runs are trials
_CANDIDATES = 4
_FEW = 0.05  # share of answers with a box below which the run is warned
_BY_HEART = 0.8  # mean IoU on training studies from which on they may be known by heart

NOT_COMPARED = (
    "nothing compares answers to training studies with those to held-out ones, so a stage 1 that knows the training studies by "
    "heart goes unnoticed. --umed_val_every 20 compares them where the records have a split val."
)


class StartCheck(TrainerCallback):
    """Ends a run, before its first step, whose checkpoint writes no boxes.

    Args:
        trainer: a `umed_plugin.training.trainer.RewardingTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Sample and count, unless the run is resumed or is not to be checked.

        Raises:
            UmedError: no answer has a box. All ranks raise it.
        """
        flags = self.trainer.flags
        wanted = flags.umed_start_check
        if wanted is None:
            wanted = STUDIES if state.max_steps >= FEWEST_STEPS else 0
        if state.global_step or not wanted or not {*BOX_REWARDS} & {*flags.reward_names()}:
            return
        has_boxes = self.trainer.train_dataset.list_data_dict.column("has_boxes")
        indices = studies_with_lesion(has_boxes, wanted)
        if not indices:
            if args.process_index == 0:
                note(
                    f"none of the {len(has_boxes)} training records has a box (objects), so no answer was looked at before the "
                    "first step."
                )
            return
        texts, counts = self._sample(indices[args.process_index :: args.world_size])
        answers, boxed, cut_off, iou = self._of_all_ranks(counts)
        if not boxed:
            raise UmedError(no_boxes(len(indices), int(answers), int(cut_off), texts[:1], flags.umed_max_new_tokens))
        if args.process_index == 0:
            found = f"{int(boxed)} of {int(answers)} answers sampled to {len(indices)} training studies have a box"
            note(f"before the first step, {found}; their mean IoU is {iou / answers:.2f}.")
            if iou > _BY_HEART * answers and not flags.umed_val_every:
                warn(
                    f"the mean IoU of {iou / answers:.2f} is on training studies. Stage 1 may know them by heart, and stage 2 "
                    "can learn little from them then. --umed_val_every 20, or umed evaluate, says what held-out studies score."
                )
            if boxed < _FEW * answers:
                warn(f"{found}: few answers can be rewarded for boxes. A longer stage 1 is likely to bring more.")

    @torch.no_grad()
    def _sample(self, indices: Sequence[int]) -> tuple[list[str], list[float]]:
        """Answers of this rank, and how many they are, how many have a box, how many are cut off, and the sum of their IoU."""
        trainer, device = self.trainer, self.trainer.args.device
        policy = trainer.accelerator.unwrap_model(trainer.model)
        was_training = policy.training
        policy.eval()
        texts: list[str] = []
        counts = [0.0] * 4
        gpus = [device] if device.type == "cuda" else []
        own = trainer.compute_loss_context_manager()
        with (
            answering(trainer),
            torch.random.fork_rng(gpus),
            gathered_parameters(policy),
            own,
            precision_of(trainer.args),
        ):
            for index in indices:
                query = trainer.train_dataset[index]
                new, ended = self._answers(policy, query)
                geometry = trainer.maker.geometry(query["record"])
                scores = [score_answer(text, query["record"], geometry) for text in new]
                boxed = sum(len(score.predicted01) > score.unread for score in scores)
                found = (len(new), boxed, len(new) - ended, sum(score.set_iou for score in scores))
                counts = [total + more for total, more in zip(counts, found)]
                texts += new
        policy.train(was_training)
        torch.clear_autocast_cache()
        return texts, counts

    def _answers(self, policy: Any, query: dict[str, Any]) -> tuple[list[str], int]:
        """A few answers to one query (an item of `QueryDataset`), and how many of them end."""
        maker, device = self.trainer.maker, self.trainer.args.device
        batch = self.trainer._prepare_inputs(collate_queries([query]))
        features = query.get("features")
        encoded = encode_images(policy, batch["images"]) if features is None else features[None].to(device)
        of_run = maker.sampling.settings
        settings = replace(of_run, num_candidates=min(of_run.num_candidates, _CANDIDATES))
        candidates = generate(policy, embed_prompts(policy, batch["prompt_ids"], encoded), settings)
        ended = (candidates.token_ids.eq(settings.eos_token_id) & candidates.mask.bool()).any(dim=1)
        return decode_answers(maker.tokenizer, candidates), int(ended.sum())

    def _of_all_ranks(self, counts: Sequence[float]) -> list[float]:
        own = torch.tensor([list(counts)], dtype=torch.float32, device=self.trainer.args.device)
        totals: list[float] = self.trainer.accelerator.gather(own).sum(dim=0).tolist()
        return totals


def studies_with_lesion(has_boxes: np.ndarray, wanted: int) -> list[int]:
    """Indices of up to ``wanted`` records with a true box, spread over all of them.

    Args:
        has_boxes: bool [n], whether each record has one.
        wanted: 1 or more.
    """
    return evenly(np.flatnonzero(has_boxes).tolist(), wanted)


def no_boxes(studies: int, answers: int, cut_off: int, examples: Sequence[str], max_new_tokens: int) -> str:
    """The message that none of the sampled answers has a box."""
    example = "".join(f" For example: {one_line(text)[:200]!r}." for text in examples)
    return (
        f"none of the {answers} answers sampled to {studies} training studies with a lesion has a box. Rewards for boxes would "
        f"be 0 for all of them and teach nothing.{example} {cut_off} answers are cut off at --umed_max_new_tokens "
        f"{max_new_tokens}. Train stage 1 until its answers have boxes (umed evaluate shows them), start from its result "
        "(--model_name_or_path), and use its --version. To start all the same: --umed_start_check 0. "
        "In run.yaml of umed upgrade these are instruction_tuning.epochs or steps, rewarding.max_new_tokens, and "
        "rewarding.flags: {umed_start_check: 0}."
    )

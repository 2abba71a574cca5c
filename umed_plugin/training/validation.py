"""Held-out validation while a stage runs: greedy answers every few steps, to check what a falling loss or a rising reward means.

Sampled rewards also rise if boxes grow to catch more of what they might miss. Greedy answers to studies of the split ``val`` show
whether the policy reads images better. Logged, with the same meaning as in `umed evaluate`:

- ``val/iou``: mean set IoU over the studies with a lesion, 0-1;
- ``val/accuracy``: share of studies whose answer names exactly the true classes, 0-1;
- ``val/box_area_ratio``: mean area of an answer's boxes over that of the true ones, as geometric mean over the studies where both
  have boxes. It climbs above 1 when boxes hedge.

With ``--report_to tensorboard`` or ``wandb``, ``--umed_val_pictures`` of the studies are shown there with the answer's and the
true boxes (`umed_plugin.training.validation_pictures`).

The first values are from before the first step. Nothing here draws a random number: training samples the same answers with and
without it.

How to run: ``--umed_val_every 20`` in either stage. `umed_plugin.training.early_stopping` ends a stage by it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from umed_plugin.data.records import Record, record_geometry
from umed_plugin.files import text_bytes
from umed_plugin.flags.rules import REWARDING
from umed_plugin.grounding.geometry import ImageGeometry
from umed_plugin.grounding.scoring import AnswerScore, score_answer
from umed_plugin.model.forward import base_llava, decode_answers, embed_prompts, encode_images
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.model.sharding import gathered_parameters
from umed_plugin.rewards.guards import box_area_ratio
from umed_plugin.training.finite_weights import answering
from umed_plugin.training.rewarding_data import collate_queries
from umed_plugin.training.run_precision import precision_of
from umed_plugin.training.validation_pictures import PictureLog, Shown, chosen_for_pictures, is_shown_by

METRICS = ("val/iou", "val/accuracy", "val/box_area_ratio")


class HeldOutValidation(TrainerCallback):
    """Logs the metrics before the first step, every ``--umed_val_every`` steps and after the last one.

    A run that resumes at step s has the values up to s in its checkpoint and continues after them.

    Args:
        trainer: of either stage; that of stage 2 also shows the values to its guards.
        dataset: a `QueryDataset` of held-out records.
    """

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.trainer, self.dataset, self.flags = trainer, dataset, trainer.args.umed
        names = [str(record["id"]) for record in dataset.list_data_dict]
        self.chosen = chosen_indices(names, self.flags.umed_val_records)
        self.pictures = PictureLog()

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Log the values before the first step, unless the run is resumed."""
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Log every ``--umed_val_every`` steps, and after the last step."""
        if state.global_step % self.flags.umed_val_every == 0 or state.global_step == state.max_steps:
            log_follows = control.should_log
            self._log()
            control.should_log = log_follows  # transformers takes any log for the step's own, which would be left out

    def _log(self) -> None:
        measured = self.measure()
        if self.flags.umed_stage == REWARDING:
            self.trainer.metrics.held_out(measured)
        self.trainer.log(measured)

    def _chosen_for_pictures(self, share: Sequence[int]) -> set[int]:
        """Of the first rank's share, the records whose pictures are shown; none where nothing takes them."""
        trainer = self.trainer
        if not trainer.is_world_process_zero() or not is_shown_by(trainer.callback_handler.callbacks):
            return set()
        return chosen_for_pictures(self.dataset.list_data_dict, share, self.flags.umed_val_pictures)

    def measure(self) -> dict[str, float]:
        """The current policy's metrics; each rank answers its share of the records. Shows pictures, where they are taken."""
        trainer, args = self.trainer, self.trainer.args
        share = self.chosen[args.process_index :: args.world_size]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        was_training = policy.training
        policy.eval()
        scores: list[AnswerScore] = []
        pictured, shown = self._chosen_for_pictures(share), list[Shown]()
        own = trainer.compute_loss_context_manager()
        with answering(trainer), gathered_parameters(policy), own, precision_of(args):
            for start in range(0, len(share), args.per_device_eval_batch_size):
                batch = share[start : start + args.per_device_eval_batch_size]
                queries = [self.dataset[index] for index in batch]
                geometries = [self._geometry(policy, query["record"]) for query in queries]
                texts = greedy_answers(policy, self.dataset.tokenizer, queries, self.flags.umed_max_new_tokens)
                found = [
                    score_answer(text, query["record"], geometry)
                    for text, query, geometry in zip(texts, queries, geometries)
                ]
                scores += found
                shown += [self._shown(*study) for study in zip(batch, geometries, texts, found) if study[0] in pictured]
        policy.train(was_training)
        self.pictures.log(trainer.state.global_step, shown, trainer.callback_handler.callbacks)
        totals = sums_and_counts(scores)[None].to(args.device)
        return metrics(trainer.accelerator.gather(totals).sum(dim=0))

    def _geometry(self, policy: Any, record: Record) -> ImageGeometry:
        tower = base_llava(policy).get_vision_tower().config
        return record_geometry(record, tower.image_size, tower.patch_size)

    def _shown(self, index: int, geometry: ImageGeometry, text: str, score: AnswerScore) -> Shown:
        record = self.dataset.list_data_dict[index]
        image = Path(self.dataset.image_path(index))
        return Shown(str(record["id"]), image, record.get("reading"), geometry, text, score)


def chosen_indices(ids: Sequence[str], limit: int) -> list[int]:
    """Indices of ``limit`` records, or of all if there are fewer: the same records in every run, whatever their order."""
    by_hash = sorted(range(len(ids)), key=lambda index: hashlib.sha256(text_bytes(ids[index])).digest())
    return sorted(by_hash[:limit])


@torch.no_grad()
def greedy_answers(policy: Any, tokenizer: Any, queries: Sequence[dict[str, Any]], max_new_tokens: int) -> list[str]:
    """Answer queries (items of `QueryDataset`) greedily in one batch.

    Args:
        policy: a LLaVA model in evaluation mode.
        tokenizer: its tokenizer.
        queries: Q items.
        max_new_tokens: longest answer.
    """
    batch = collate_queries(queries)
    prompts = embed_prompts(policy, batch["prompt_ids"], encode_images(policy, batch["images"]))
    answers = generate(
        policy,
        prompts,
        SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=tokenizer.eos_token_id),
    )
    return decode_answers(tokenizer, answers)


def sums_and_counts(scores: Sequence[AnswerScore]) -> Tensor:
    """[3, 2] float64: for each of `METRICS` the sum (for the area ratio, of its logarithm) and the count; add them over ranks."""
    ratios = [box_area_ratio(score.predicted01, score.true01) for score in scores]
    columns = (
        [score.set_iou for score in scores if score.n_true],
        [score.accuracy for score in scores if score.diagnosed],
        [math.log(ratio) for ratio in ratios if ratio is not None],
    )
    return torch.tensor([[sum(column), len(column)] for column in columns], dtype=torch.float64)


def metrics(totals: Tensor) -> dict[str, float]:
    """The metrics from [3, 2] sums and counts over all ranks; a metric whose count is 0 is left out."""
    means = {name: (total / count).item() for name, (total, count) in zip(METRICS, totals) if count > 0}
    if "val/box_area_ratio" in means:
        means["val/box_area_ratio"] = math.exp(means["val/box_area_ratio"])
    return means

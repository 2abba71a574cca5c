"""``--umed_keep``: stage 1 holds the answers of the model to those of a teacher, in most cases of its own start.

Each batch is first passed through the teacher without gradient, then through the model as ever; `umed_plugin.model.distillation`
compares them. Teachers:

- the start: the model with its adapter off and its other trained weights as they were; nothing but a copy of those weights is
  kept (full fine-tuning: of all weights). See `umed_plugin.training.reference`.
- ``--umed_teacher CKPT``: another LLaVA of the same tokenizer and template, in memory beside the model.

Logged: ``keep_kl``, the mean KL on answer tokens in nats, without its weight. The trainer's ``loss`` holds it with its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from umed_plugin.checkpoints.loading import load_checkpoint
from umed_plugin.errors import UmedError, note
from umed_plugin.flags.rules import KeepWeights
from umed_plugin.model.distillation import AnswerStates, Head, answer_kl, answer_states, head_of
from umed_plugin.model.forward import base_llava
from umed_plugin.training.extra_loss import Gather, PlainLoss
from umed_plugin.training.reference import ReferencePolicy


class StartTeacher:
    """The model as it is now. Create it before a checkpoint is loaded for resuming.

    Args:
        model: that learns, without DDP, on its training device.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._start = model, ReferencePolicy(model)

    def __call__(self, inputs: dict[str, Any]) -> tuple[AnswerStates, Head]:
        """Its states for a batch, and its output layer."""
        llava = base_llava(self._model)
        training = self._model.training
        self._model.eval()  # no dropout, and no checkpointing of a pass without gradient
        try:
            with self._start.as_reference(self._model), answer_states(llava, without_logits=True) as found:
                self._model(**inputs)
        finally:
            self._model.train(training)
        head = head_of(llava)
        if head.layer is not None:
            return found[0], head
        return found[0], Head(self._at_start(head.weight), None if head.bias is None else self._at_start(head.bias))

    def _at_start(self, parameter: Tensor) -> Tensor:
        value: Tensor = self._start.value_at_start(parameter)
        return value.detach().to(parameter)


class CheckpointTeacher:
    """Another LLaVA checkpoint.

    Args:
        path: its folder.
        llava: the model that learns, without wrapper.
        dtype: in which the teacher computes.

    Raises:
        UmedError: its output layer has another size, or its image processor another one.
    """

    def __init__(self, path: str, llava: Any, dtype: torch.dtype) -> None:
        _, teacher, processor = load_checkpoint(path, device=str(llava.device), dtype=dtype)
        self._path, self._teacher = path, teacher.requires_grad_(False)
        own, other = (model.get_output_embeddings().out_features for model in (llava, teacher))
        if own != other:
            raise UmedError(
                f"--umed_teacher {path}: predicts {other} tokens, but the model that learns {own}. Needed: a checkpoint with the "
                "same vocabulary."
            )
        sees, seen = (_in_lists(p.to_dict()) for p in (processor, llava.get_vision_tower().image_processor))
        differing = [key for key in ("size", "crop_size", "image_mean", "image_std") if sees.get(key) != seen.get(key)]
        if differing:
            raise UmedError(
                f"--umed_teacher {path}: its vision tower reads images otherwise ({differing[0]}: {sees.get(differing[0])} "
                f"instead of {seen.get(differing[0])}). Needed: a checkpoint whose tower takes the same pixels."
            )
        for key in ("tokenizer_model_max_length", "tokenizer_padding_side"):
            setattr(teacher.config, key, getattr(llava.config, key, None))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> tuple[AnswerStates, Head]:
        """Its states for a batch, and its output layer."""
        images = inputs["images"]
        images = [image.to(self._teacher.dtype) for image in images]
        if isinstance(inputs["images"], Tensor):
            images = torch.stack(images)
        with answer_states(self._teacher, without_logits=True) as found:
            self._teacher(**{**inputs, "images": images}, use_cache=False)
        return found[0], head_of(self._teacher)


class KeepingLoss(PlainLoss):
    """An `umed_plugin.training.extra_loss.ExtraLoss`: the KL to a teacher.

    Args:
        model: that learns, without DDP.
        teacher: a batch -> its states and its output layer.
        weights: of the KL and of the sum, and the temperature.
        rows: ``--umed_logit_rows``.
    """

    needs_answers = True

    def __init__(self, model: Any, teacher: Any, weights: KeepWeights, rows: int) -> None:
        self._llava, self._teacher, self._weights, self._rows = base_llava(model), teacher, weights, rows
        self._reference: tuple[AnswerStates, Head] | None = None
        self._sums = [0.0, 0.0]

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Ask the teacher."""
        self._reference = self._teacher(inputs)

    def added_to(self, loss: Tensor, answers: AnswerStates | None) -> Tensor:
        """(loss + weight x KL) / divisor."""
        if self._reference is None or answers is None:
            raise RuntimeError("the teacher has to be asked before the pass")
        (reference, head), self._reference = self._reference, None
        if not torch.equal(reference.labels, answers.labels):
            raise UmedError(
                f"--umed_teacher: sees {len(reference.labels)} answer tokens of a batch, but the model {len(answers.labels)}: an "
                "image takes another number of tokens there, and --model_max_length cuts off an answer. Raise it."
            )
        temperature = self._weights.temperature
        own = head_of(self._llava)
        kl = answer_kl(answers.states, own, reference.states, head, temperature=temperature, rows=self._rows)
        self._sums[0] += float(kl.detach()) * len(answers.states)
        self._sums[1] += len(answers.states)
        return (loss + self._weights.kl * kl.to(loss)) / self._weights.divisor

    def metrics(self, gather: Gather) -> dict[str, float]:
        """``keep_kl``."""
        total, tokens = gather(self._sums)
        self._sums = [0.0, 0.0]
        return {"keep_kl": total / tokens} if tokens else {}


def keeping_loss(model: Any, args: Any) -> KeepingLoss:
    """The loss of ``--umed_keep``, with the teacher that the flags name.

    Args:
        model: that learns, without DDP, on its training device.
        args: LLaVA's TrainingArguments with the flags.
    """
    flags = args.umed
    if flags.umed_teacher is None:
        teacher: Any = StartTeacher(model)
        name = "its own start"
    else:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        teacher, name = CheckpointTeacher(flags.umed_teacher, base_llava(model), dtype), flags.umed_teacher
    weights = flags.keep_weights()
    if args.process_index == 0:
        note(
            f"the model is held to {name}: loss = (cross-entropy + {weights.kl:g} KL) / {weights.divisor:g}, at temperature "
            f"{weights.temperature:g}. Each batch takes a second pass, without gradient."
        )
    return KeepingLoss(model, teacher, weights, flags.umed_logit_rows)


def _in_lists(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an image processor; a mean is a list or a tuple, depending on the version of transformers."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

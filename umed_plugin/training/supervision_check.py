"""Before training starts: check on samples of the records which tokens are supervised.

LLaVA masks questions by counting tokens. If its count is wrong, it masks a sample whole and only prints a line, or supervises the
wrong tokens. `umed_plugin.training.tuning_data` is the dataset that is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template
from umed_plugin.data.image_files import evenly
from umed_plugin.errors import UmedError, warn
from umed_plugin.training.tuning_data import GroundedDataset, tokenize_record

_EXAMPLES = 3
_MOST_LONG = 500
# No less than what the templates add: for each turn, and once.
_ROLE_BYTES, _SYSTEM_BYTES = 24, 800


@dataclass(frozen=True)
class SupervisionReport:
    """Result of `check_supervision`: records and templates checked, supervised tokens, and samples whose answer is cut."""

    records: int
    templates: tuple[str, ...]
    supervised_tokens: int
    truncated: int


def check_supervision(dataset: GroundedDataset, tokenizer: Any, samples: int) -> SupervisionReport:
    """Tokenize ``samples`` records, spread over the data, under each template, and check what would be learned.

    Raises:
        UmedError: anything other than the answers and their end tokens is supervised, or a record is masked whole. Or a record's
            whole answer is cut off, among all that could be too long.
    """
    indices = evenly(range(len(dataset)), samples)
    spec = TEMPLATES.get(dataset.template)
    templates = (dataset.template, spec.stock) if spec else (dataset.template,)
    faults, masked, truncated, tokens = [], 0, 0, 0
    for template in templates:
        for index in indices:
            ids, labels = tokenize_record(dataset, index, template)
            cut = _cut_tokens(dataset.data_args, tokenizer, ids, labels)
            supervised = int((labels != IGNORE_INDEX).sum())
            tokens += supervised
            truncated += cut > 0
            masked += supervised == cut
            fault = supervision_fault(dataset.list_data_dict[index], template, tokenizer, ids, labels)
            if fault is not None or supervised == cut:
                faults.append(fault or _whole_answer_cut(dataset.list_data_dict[index], template, tokenizer))
    if faults:
        raise UmedError(
            f"{len(faults)} of {len(indices) * len(templates)} checked samples would be supervised wrongly "
            f"({masked} of them masked whole), for example:\n"
            + "\n".join(f"  - {fault}" for fault in faults[:_EXAMPLES])
            + "\n  remedy: the template must fit the checkpoint (--version umed_mistral for LLaVA-Med 1.5, umed_v1 for "
            "LLaVA-1.5) and its own tokenizer, and --model_max_length must hold image and text. If only records with several "
            "questions fail, split them into one record per question."
        )
    _tell_of_long_records(dataset, tokenizer)
    return SupervisionReport(len(indices), templates, tokens, truncated)


def _tell_of_long_records(dataset: GroundedDataset, tokenizer: Any) -> None:
    """Warn of answers whose end lies beyond ``model_max_length``; LLaVA cuts them without a word.

    A token stands for one byte of text or more, so most records are surely short enough. The others are tokenized, of very many
    an even sample.

    Raises:
        UmedError: the whole answer of a record lies beyond it: nothing would be learned, and a batch of such has no loss.
    """
    long = [index for index in range(len(dataset)) if _could_be_too_long(dataset, index, tokenizer.model_max_length)]
    looked_at = evenly(long, _MOST_LONG)
    cut: list[int] = []
    lost: list[int] = []
    for index in looked_at:
        ids, labels = tokenize_record(dataset, index, dataset.template)
        beyond = _cut_tokens(dataset.data_args, tokenizer, ids, labels)
        # LLaVA itself cuts a text without an image while it tokenizes.
        already_cut = "image" not in dataset.list_data_dict[index] and len(ids) >= tokenizer.model_max_length
        if beyond or already_cut:
            (lost if beyond == int((labels != IGNORE_INDEX).sum()) else cut).append(index)
    of = f"{len(dataset)} records" if len(looked_at) == len(long) else f"{len(looked_at)} long records (of {len(long)})"
    if lost:
        first = _whole_answer_cut(dataset.list_data_dict[lost[0]], dataset.template, tokenizer)
        raise UmedError(
            f"{len(lost)} of {of} would teach nothing, the first: {first}. Raise --model_max_length, or remove them."
        )
    if cut:
        name = dataset.list_data_dict[cut[0]].get("id")
        warn(
            f"{len(cut)} of {of} lose the end of their answer at --model_max_length {tokenizer.model_max_length}, the first: "
            f"record {name}. The model would learn to stop there, or not at all. Raise it."
        )


def _could_be_too_long(dataset: GroundedDataset, index: int, longest: int) -> bool:
    record = dataset.list_data_dict[index]
    text = sum(len(turn["value"].encode()) + _ROLE_BYTES for turn in record["conversations"])
    return text + _SYSTEM_BYTES + ("image" in record) * int(dataset.data_args.umed_num_patches) > longest


def supervision_fault(
    record: dict[str, Any], template: str, tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor
) -> str | None:
    """Compare the supervised spans of ``labels`` with the record's answers, each followed by the template's end token."""
    conversation = conversation_template(template)
    end = conversation.sep2 or conversation.sep
    supervised = [
        tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for span in _supervised_spans(ids.tolist(), labels.tolist())
    ]
    answers = [turn["value"] + end for turn in record["conversations"] if turn["from"] == "gpt"]
    if ["".join(text.split()) for text in supervised] == ["".join(text.split()) for text in answers]:
        return None
    where = f"record {record.get('id')}, template {template}"
    if not supervised:
        return f"{where}: masked whole (LLaVA's 'tokenization mismatch'); its answers are {answers}"
    return f"{where}: supervised {supervised}, but its answers are {answers}"


def _supervised_spans(ids: list[int], labels: list[int]) -> list[list[int]]:
    """Token ids of each run of adjacent positions that have a label."""
    spans: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(ids, labels):
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(token)
        previous = label
    return spans


def _cut_tokens(data_args: Any, tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Number of supervised tokens beyond ``model_max_length``; an image token counts as the patches that replace it."""
    images = int((ids == IMAGE_TOKEN_INDEX).sum())
    excess = len(ids) + images * (data_args.umed_num_patches - 1) - tokenizer.model_max_length
    return int((labels[-excess:] != IGNORE_INDEX).sum()) if excess > 0 else 0


def _whole_answer_cut(record: dict[str, Any], template: str, tokenizer: Any) -> str:
    return (
        f"record {record.get('id')}, template {template}: its whole answer lies beyond --model_max_length "
        f"{tokenizer.model_max_length} (the image takes most of it)"
    )

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
from umed_plugin.errors import UmedError, warn
from umed_plugin.training.tuning_data import GroundedDataset, tokenize_record

_EXAMPLES = 3


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
        UmedError: anything other than the answers and their end tokens is supervised, or a record is masked whole.
    """
    count = min(samples, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
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
    if truncated:
        warn(
            f"{truncated} of {len(indices) * len(templates)} checked samples lose the end of their answer at "
            f"--model_max_length {tokenizer.model_max_length}. Raise it."
        )
    return SupervisionReport(len(indices), templates, tokens, truncated)


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

"""Which tokens are supervised: verified on samples of the records before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template
from umed_plugin.errors import UmedError
from umed_plugin.training.tuning_data import GroundedDataset, tokenize_record

_EXAMPLES = 3


@dataclass(frozen=True)
class SupervisionReport:
    """What `check_supervision` saw: records and templates checked, supervised tokens, and records whose answer is cut."""

    records: int
    templates: tuple[str, ...]
    supervised_tokens: int
    truncated: int


def check_supervision(dataset: GroundedDataset, tokenizer: Any, samples: int) -> SupervisionReport:
    """Tokenize ``samples`` records, spread over the data, under each template, and look at what would be learnt.

    LLaVA masks by counting tokens; where the count is off it masks a sample whole and only prints, or supervises the
    wrong tokens.

    Raises:
        UmedError: anything but exactly the answers and their end tokens is supervised, or a record is masked whole.
    """
    count = min(samples, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    spec = TEMPLATES.get(dataset.template)
    templates = (dataset.template, spec.stock) if spec else (dataset.template,)
    faults, masked, truncated, tokens = [], 0, 0, 0
    for template in templates:
        for index in indices:
            ids, labels = tokenize_record(dataset, index, template)
            lost = _cut_off(dataset.data_args, tokenizer, ids, labels)
            supervised = int((labels != IGNORE_INDEX).sum())
            tokens += supervised
            truncated += lost > 0
            masked += supervised == lost
            fault = supervision_fault(dataset.list_data_dict[index], template, tokenizer, ids, labels)
            if fault is not None or supervised == lost:
                faults.append(fault or _cut_whole(dataset.list_data_dict[index], template, tokenizer))
    if faults:
        raise UmedError(
            f"{len(faults)} of {len(indices) * len(templates)} checked samples would be trained wrongly "
            f"({masked} of them masked whole), for example:\n"
            + "\n".join(f"  - {fault}" for fault in faults[:_EXAMPLES])
            + "\n  remedy: the template must fit the checkpoint (--version umed_mistral for LLaVA-Med 1.5, umed_v1 for "
            "LLaVA-1.5), with the tokenizer that came with it, and --model_max_length must hold image and text. Where only "
            "records with several questions fail, make one record of each question."
        )
    if truncated:
        print(
            f"umed: WARNING: {truncated} of {len(indices) * len(templates)} checked samples lose the end of their answer at "
            f"--model_max_length {tokenizer.model_max_length}. Raise it.",
            flush=True,
        )
    return SupervisionReport(len(indices), templates, tokens, truncated)


def supervision_fault(
    record: dict[str, Any], template: str, tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor
) -> str | None:
    """Compare the supervised stretches of ``labels`` with the record's answers, each with the template's end token."""
    conversation = conversation_template(template)
    end = conversation.sep2 or conversation.sep
    found = [
        tokenizer.decode(stretch, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for stretch in _supervised_stretches(ids.tolist(), labels.tolist())
    ]
    wanted = [turn["value"] + end for turn in record["conversations"] if turn["from"] == "gpt"]
    if ["".join(text.split()) for text in found] == ["".join(text.split()) for text in wanted]:
        return None
    where = f"record {record.get('id')}, template {template}"
    if not found:
        return f"{where}: masked whole (LLaVA's 'tokenization mismatch'); its answers were {wanted}"
    return f"{where}: supervised {found}, but its answers are {wanted}"


def _supervised_stretches(ids: list[int], labels: list[int]) -> list[list[int]]:
    """Token ids of each run of positions that carry a label."""
    stretches: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(ids, labels):
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                stretches.append([])
            stretches[-1].append(token)
        previous = label
    return stretches


def _cut_off(data_args: Any, tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Supervised tokens beyond ``model_max_length``, an image token counting as the patches that will stand for it."""
    images = int((ids == IMAGE_TOKEN_INDEX).sum())
    excess = len(ids) + images * (data_args.umed_num_patches - 1) - tokenizer.model_max_length
    return int((labels[-excess:] != IGNORE_INDEX).sum()) if excess > 0 else 0


def _cut_whole(record: dict[str, Any], template: str, tokenizer: Any) -> str:
    return (
        f"record {record.get('id')}, template {template}: its whole answer lies beyond --model_max_length "
        f"{tokenizer.model_max_length} (the image takes most of it)"
    )

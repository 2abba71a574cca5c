"""Stage 1's data: LLaVA's own dataset over grounded records.

A share of the records, chosen by a hash of their id, is trained under LLaVA's stock template. Stock LLaVA does not know ours and
will prompt the exported checkpoint with its own. ``--umed_on_bad_image`` decides whether an unreadable image stops the run, or is
reported and skipped.

Departure from the paper, which does not say how prompts are built: see `umed_plugin.data.template_writer`.

Run through ``umed-run ... --umed_stage instruction_tuning`` (`patches/data_module.py` puts it in LLaVA's place).
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava import conversation as llava_conversation
from llava.mm_utils import expand2square
from llava.train import train as llava_train
from PIL import Image
from torch.utils.data import Dataset

from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template
from umed_plugin.data.augmentation.study import Study
from umed_plugin.data.augmentation.survey import survey
from umed_plugin.data.images import check_picture
from umed_plugin.data.images.cache import ImageCache
from umed_plugin.data.record_file import JoinedRecords
from umed_plugin.data.records import Record
from umed_plugin.errors import UmedError, note, warn
from umed_plugin.files import text_bytes
from umed_plugin.grounding.box_text import scan
from umed_plugin.grounding.processor import GIVE_SIZES, missing_size, processor_fault
from umed_plugin.training.augmenter import Augmenter
from umed_plugin.training.replay import RECORDS
from umed_plugin.training.similar_records import similar_records
from umed_plugin.training.training_records import training_records

# What PIL, the image processors and the tokenizers raise for one bad record.
UNREADABLE = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ),
    *(Image.DecompressionBombError, UmedError),
)


@contextmanager
def using_template(name: str) -> Iterator[llava_conversation.Conversation]:
    """Make a template LLaVA's default conversation, which its preprocessing reads, for the length of the block."""
    before = llava_conversation.default_conversation
    llava_conversation.default_conversation = conversation_template(name)
    try:
        yield llava_conversation.default_conversation
    finally:
        llava_conversation.default_conversation = before


def _check_processor(processor: Any, image_aspect_ratio: str, records: JoinedRecords, *, tells: bool) -> None:
    """Refuse to train with boxes that are elsewhere in the image than their numbers say; warn where no record has any."""
    values = {} if processor is None else processor.to_dict()
    if (missing := missing_size(values)) is not None:
        raise UmedError(f"--vision_tower: its image processor can prepare no image: {missing}. {GIVE_SIZES}")
    fault = processor_fault(values, image_aspect_ratio) if values else None
    if fault is None:
        return
    found = (
        f"--vision_tower: all boxes would be off, since its image processor differs from LLaVA's: {fault}. Give size "
        "(shortest_edge) and crop_size in its preprocessor_config.json the tower's image_size, and do_resize and "
        "do_center_crop true."
    )
    # Plain items of LLaVA have boxes in their text alone. All are read only here, where there is a fault.
    if records.column("has_boxes").any() or any(map(_writes_a_box, records)):
        raise UmedError(found)
    if tells:
        warn(f"{found} No record has a box, so the training goes on.")


def _writes_a_box(record: Record) -> bool:
    return any(found.is_box() for turn in record["conversations"] for found in scan(str(turn.get("value"))))


class GroundedDataset(llava_train.LazySupervisedDataset):
    """LLaVA's dataset over grounded records. An item is LLaVA's: ``input_ids`` [L], ``labels`` [L], ``image`` [3, S, S].

    With ``--umed_augment``, item ``i + e * n`` is record ``i`` of ``n`` as epoch ``e`` shows it. With ``--umed_replay``, an
    item has its record's index too, ``record_indices``.

    Args:
        tokenizer: the model's.
        data_args: LLaVA's, with the attribute ``umed_run`` (see `patches/train_arguments.py`).
        training_args: LLaVA's, with the flags in ``umed``.
        split: of the records.
    """

    def __init__(self, tokenizer: Any, data_args: Any, training_args: Any, split: str = "train") -> None:
        # LLaVA's own __init__ reads one JSON file and nothing else.
        Dataset.__init__(self)
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.flags = training_args.umed
        self.template = data_args.umed_run.model_args.version
        self.list_data_dict: JoinedRecords = training_records(data_args, training_args, split)
        processor, tells = getattr(data_args, "image_processor", None), training_args.process_index == 0
        _check_processor(processor, data_args.image_aspect_ratio, self.list_data_dict, tells=tells and split == "train")
        self.names_records = split == "train" and self.flags.umed_replay > 0
        self._reported: set[int] = set()
        self.augmenter: Augmenter | None = None
        if self.flags.umed_augment and split == "train":
            self.augmenter = Augmenter(training_args.seed, data_args.image_processor, data_args.image_aspect_ratio)
            if training_args.process_index == 0:
                found = survey(self.list_data_dict, training_args.seed)
                (note if found.moved else warn)(found.in_words())
        self.image_cache: ImageCache | None = None
        if self.flags.umed_image_cache is not None:
            most_bytes = int(self.flags.umed_image_cache_gb * 1e9)
            self.image_cache = ImageCache(
                self.flags.umed_image_cache, data_args.image_processor, data_args.image_aspect_ratio, most_bytes
            )
        if self.flags.umed_similar:
            studies = self.list_data_dict if split == "train" else training_records(data_args, training_args)
            self.list_data_dict = similar_records(self, training_args, split, studies)

    @property
    def lengths(self) -> list[int]:
        """LLaVA's measure of each record for batches of like length: its words, and 128 for an image."""
        return (self._words() + 128 * self.list_data_dict.column("has_image")).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """LLaVA's measure of each record for batches of one modality: its words, negative without an image."""
        return np.where(self.list_data_dict.column("has_image"), self._words(), -self._words()).tolist()

    def _words(self) -> np.ndarray:
        return self.list_data_dict.column("words").astype(np.int64)

    def template_of(self, index: int) -> str:
        """``--version`` or its stock counterpart; the same for a record in every epoch and on every rank."""
        if self.template not in TEMPLATES:
            return self.template
        name = str(self.list_data_dict[index].get("id", index))
        fraction = int.from_bytes(hashlib.sha256(text_bytes(name)).digest()[:8], "big") / 2**64  # uniform in 0..1
        return TEMPLATES[self.template].stock if fraction < self.flags.umed_stock_template_share else self.template

    def image_path(self, index: int) -> str | None:
        """Path where LLaVA will read the record's image; None for a record without one."""
        image = self.list_data_dict[index].get("image")
        return None if image is None else os.path.join(self.data_args.image_folder, image)

    def load_image(self, index: int) -> torch.Tensor:
        """The record's image as LLaVA's training sees it, float [3, S, S]."""
        return self.load_pixels(str(self.image_path(index)), self.list_data_dict[index].get("reading"))

    def load_pixels(self, path: str, reading: Any = None) -> torch.Tensor:
        """An image file as LLaVA's training sees it, float [3, S, S]; only the image cache heeds ``reading``."""
        if self.image_cache is not None:
            return self.image_cache.pixels(path, reading)
        check_picture(Path(path))
        processor = self.data_args.image_processor
        image = Image.open(path).convert("RGB")
        if self.data_args.image_aspect_ratio == "pad":
            image = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
        return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]

    def study(self, index: int, epoch: int = 0) -> Study:
        """Record ``index`` as an epoch, counted from 0, shows it: as it is without ``--umed_augment``."""
        record = self.list_data_dict[index]
        return Study(record) if self.augmenter is None else self.augmenter.study(record, epoch, index)

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The item of record ``index`` in an epoch; errors of reading its image pass through.

        Raises:
            UmedError: the image is missing, damaged or too large, or has a size that the image processor cannot take.
        """
        path, study = self.image_path(index), self.study(index, epoch)
        if path is not None and (self.image_cache is not None or study.changed):
            ids, labels = tokenize(self, study.record, self.template_of(index))
            image = self.load_image(index)
            image = image if self.augmenter is None else self.augmenter.pixels(image, study, path)
            return {"input_ids": ids, "labels": labels, "image": image}
        if path is not None:
            check_picture(Path(path))
        with using_template(self.template_of(index)):
            return super().__getitem__(index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        epoch = i // len(self)
        for step in range(len(self)):
            index = (i + step) % len(self)
            try:
                item = self.sample(index, epoch)
                return {**item, RECORDS: index} if self.names_records else item
            except UNREADABLE as error:
                fault = self._image_fault(index)
                if fault is None:
                    name = self.list_data_dict[index].get("id")
                    raise UmedError(
                        f"record {name}: cannot be trained on ({type(error).__name__}: {error})."
                    ) from error
                self._refuse_or_report(index, fault, error)
        raise UmedError(
            f"none of the {len(self)} images can be read. Check --image_folder {self.data_args.image_folder}."
        )

    def _image_fault(self, index: int) -> str | None:
        """What is wrong with the image, or None if the model's input can be made of it and the error has another cause."""
        path = self.image_path(index)
        if path is None:
            return None
        try:
            self.load_image(index)
        except UNREADABLE as error:
            return f"record {self.list_data_dict[index].get('id')}: cannot read the image {path} ({error})."
        return None

    def _refuse_or_report(self, index: int, fault: str, error: Exception) -> None:
        if self.flags.umed_on_bad_image == "stop":
            raise UmedError(
                f"{fault} Repair the file, remove the record, or continue without it: --umed_on_bad_image skip."
            ) from error
        if index not in self._reported:
            self._reported.add(index)
            warn(f"{fault} Skipped: the next record takes its place.")


def tokenize_record(dataset: GroundedDataset, index: int, template: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` [L] and ``labels`` [L] of a record by LLaVA's own preprocessing, without reading its image."""
    return tokenize(dataset, dataset.list_data_dict[index], template)


def tokenize(dataset: GroundedDataset, record: Record, template: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tokenize_record`, of a record as an epoch shows it."""
    with using_template(template):
        sources = copy.deepcopy([record["conversations"]])
        if "image" in record:
            sources = llava_train.preprocess_multimodal(sources, dataset.data_args)
        item = llava_train.preprocess(sources, dataset.tokenizer, has_image="image" in record)
    return item["input_ids"][0], item["labels"][0]

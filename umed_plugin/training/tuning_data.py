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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava import conversation as llava_conversation
from llava.mm_utils import expand2square
from llava.train import train as llava_train
from PIL import Image
from torch.utils.data import Dataset

from umed_plugin import files
from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template, separators
from umed_plugin.data import record_writer
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.augmentation.study import Study
from umed_plugin.data.build import build_records
from umed_plugin.data.image_files import check_image_files
from umed_plugin.data.images import READERS, check_picture, file_states
from umed_plugin.data.images.cache import ImageCache
from umed_plugin.data.recipes.options import SPLITS
from umed_plugin.data.recipes.recipe import AnyRecipe, load_recipe
from umed_plugin.data.record_file import JoinedRecords, RecordFile, make_index, open_records
from umed_plugin.data.records import Record, check_exists, not_records, save_records
from umed_plugin.data.texts import read_json
from umed_plugin.errors import UmedError, note, warn
from umed_plugin.flags.rules import REWARDING
from umed_plugin.training.augmenter import Augmenter, augmentation_in_words
from umed_plugin.training.first_process import first_process_does
from umed_plugin.training.label_share import own_share
from umed_plugin.training.replay import RECORDS
from umed_plugin.training.similar_records import similar_records

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


def training_records(data_args: Any, training_args: Any, split: str = "train") -> JoinedRecords:
    """The records of ``--umed_recipe`` and ``--data_path`` in one split; they are read when they are asked for.

    Raises:
        UmedError: a file cannot be read, an item cannot be trained on (`umed_plugin.data.items`), the split is empty, or records
            were written for another ``--image_aspect_ratio``.
    """
    flags = training_args.umed
    marks = separators(data_args.umed_run.model_args.version)
    parts: list[RecordFile] = []
    if flags.umed_recipe is not None:
        parts.append(_recipe_records(data_args, training_args, split, marks))
    if data_args.data_path is not None:
        parts.append(_file_records(data_args, flags, split, marks))
    records = JoinedRecords(parts)
    tells = training_args.process_index == 0
    if flags.umed_stage == REWARDING:
        records = _without_probes(records, tells)
    splits = records.texts("split")
    of_split = records.where(splits == split)
    if len(of_split) < len(records) and split == "train" and tells:
        _tell_other_splits(splits.tolist())
    if not of_split:
        found = ", ".join(map(repr, sorted(set(splits.tolist()))))
        raise UmedError(
            f"{data_args.data_path or flags.umed_recipe}: has no record of the split {split!r}; 'split' is {found or 'empty'}."
        )
    if split != "train":
        of_split = _with_true_boxes(of_split, split, tells)
    _check_aspect_ratio(of_split, data_args.image_aspect_ratio)
    if flags.umed_label_share is not None and split == "train":
        of_split, divided = own_share(of_split, flags.umed_label_share, flags.umed_stage)
        if tells:
            note(divided)
    if data_args.image_folder is None:
        # Paths of built records are absolute. os.path.join keeps them, but does not accept None before them.
        data_args.image_folder = os.curdir
    return of_split


def _with_true_boxes(records: JoinedRecords, split: str, tells: bool) -> JoinedRecords:
    """The held-out records that answers can be scored by. Stage 1 also trains on plain items, which have no true boxes."""
    labelled = records.where(records.column("labelled"))
    if not labelled:
        raise UmedError(
            f"--umed_val_every: none of the {len(records)} records of the split {split!r} has true boxes. Answers are scored by "
            "the records that `umed recipe build` writes."
        )
    if len(labelled) < len(records) and tells:
        note(
            f"{len(records) - len(labelled)} of {len(records)} held-out records have no true boxes and are not scored."
        )
    return labelled


def _without_probes(records: JoinedRecords, tells: bool) -> JoinedRecords:
    """Stage 2 rewards diagnoses with boxes; the answer to a probe is one of its options."""
    probes = records.column("probe")
    if probes.any() and tells:
        note(f"{int(probes.sum())} probes are left out: stage 1 trains on them, stage 2 does not.")
    return records.where(~probes) if probes.any() else records


def _tell_other_splits(splits: Sequence[str]) -> None:
    """Say how many records are not trained on, with the name of their split. A name that nothing reads is a warning."""
    others = Counter(name for name in splits if name != "train")
    unknown = {name: count for name, count in others.items() if name not in SPLITS}
    if unknown:
        named = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:3])
        warn(f"records with the split {named} are used by nothing. Known splits: {', '.join(SPLITS)}.")
    note(f"{sum(others.values())} records of other splits ({', '.join(sorted(others))}) are left out of training.")


def _check_files(records: RecordFile, data_args: Any, flags: Any, split: str) -> None:
    """Look for the images of a records file. Those of a recipe were read when its records were built."""
    cached = flags.umed_image_cache is not None
    # Which images a feature cache holds is known once the tower is loaded: `QueryDataset.use_feature_cache` reads the others.
    has_features = flags.umed_stage == REWARDING and flags.umed_feature_cache is not None and split == "train"
    has_reading = records.column("has_reading")
    only_here = np.flatnonzero(has_reading)
    if len(only_here) and not cached:
        raise UmedError(
            f"--data_path {data_args.data_path}: {len(only_here)} of {len(records)} records (the first: "
            f"{records[only_here[0]].get('id')}) name an image that LLaVA does not read as it was annotated ('reading': a slice, "
            "a window). Give --umed_image_cache, or build the records again with images: umed recipe build."
        )
    check_image_files(
        records.where(~has_reading),
        data_args.image_folder or os.curdir,
        f"--data_path {data_args.data_path}",
        skip=flags.umed_on_bad_image == "skip",
        opened_by_llava=not cached and not has_features,
    )


def _file_records(data_args: Any, flags: Any, split: str, marks: Sequence[str]) -> RecordFile:
    """Records of a JSON file. Plain LLaVA items are accepted unless ``strict``: rewards need the true boxes."""
    file, where = Path(data_args.data_path), f"--data_path {data_args.data_path}"
    strict = flags.umed_stage == REWARDING
    if strict:
        check_exists(file)

    def opened() -> RecordFile:
        failed = partial(not_records if strict else _not_items, file)
        return open_records(file, where, marks, strict=strict, failed=failed)

    checked: list[RecordFile] = []

    def check() -> None:
        records = opened()
        _check_files(records.where(records.texts("split") == split), data_args, flags, split)
        checked.append(records)

    first_process_does(check, f"check the records of {where}")
    return checked[0] if checked else opened()


def _not_items(path: Path, error: Exception) -> UmedError:
    try:
        content = read_json(path)
    except UmedError as found:
        is_lines = path.name.endswith("l") or "Extra data: line 2" in str(found)
        lines = " It seems to be JSON lines: make one list of them." if is_lines else ""
        reason = str(found).removeprefix(f"{path}: ")
        return UmedError(
            f"--data_path {path}: is not JSON that can be read ({reason}). Expected: a list of LLaVA items.{lines}"
        )
    if isinstance(content, list):
        return UmedError(f"--data_path {path}: cannot be read item by item ({error}). Save it as UTF-8.")
    return UmedError(f"--data_path {path}: is not a list of LLaVA items, each with 'conversations'.")


def _check_aspect_ratio(records: JoinedRecords, image_aspect_ratio: str) -> None:
    """Boxes in the text are 0-1 of the square that the model sees, so records and training must agree on that square."""
    theirs = records.texts("aspect")
    other = np.flatnonzero((theirs != image_aspect_ratio) & (theirs != ""))
    if len(other):
        first = theirs[other[0]]
        raise UmedError(
            f"{len(other)} of {len(records)} records (the first: {records[other[0]].get('id')}) were written for "
            f"--image_aspect_ratio {first}, but training runs with {image_aspect_ratio}: every box would be in the wrong "
            f"place. Train with --image_aspect_ratio {first}, or build the records again with "
            f"`umed recipe build ... --image-aspect-ratio {image_aspect_ratio}`."
        )


def _recipe_records(data_args: Any, training_args: Any, split: str, marks: Sequence[str]) -> RecordFile:
    """The recipe's records, built into ``output_dir/umed_data`` by one process unless the same build exists already."""
    folder = Path(training_args.output_dir).resolve() / "umed_data" / ("" if split == "train" else split)
    file, where = folder / "records.json", training_args.umed.umed_recipe

    def build_and_index() -> None:
        _build_or_reuse(folder, split, data_args.image_aspect_ratio, training_args)
        make_index(file, where, marks, strict=True, failed=partial(not_records, file))

    first_process_does(build_and_index, f"build the records of {where}")
    check_exists(file)
    return open_records(file, where, marks, strict=True, failed=partial(not_records, file))


def _build_or_reuse(folder: Path, split: str, image_aspect_ratio: str, training_args: Any) -> None:
    """Write ``records.json`` and a stamp of all that it is built from, unless both exist and the stamp has not changed."""
    flags = training_args.umed
    recipe = load_recipe(flags.umed_recipe)
    file, stamp_file = folder / "records.json", folder / "build.json"
    options = {
        "image_aspect_ratio": image_aspect_ratio,
        "box_decimals": flags.umed_box_decimals,
        "seed": training_args.seed,
        "on_bad_image": flags.umed_on_bad_image,
        "render": flags.umed_image_cache is None,
    }
    stamp = {
        "recipe": recipe.path,
        "recipe_sha256": recipe.sha256,
        "writers": record_writer.WRITERS,
        "readers": READERS,
        **_data_stamp(recipe, flags.umed_data_root),
        **options,
    }
    if file.is_file() and _holds(stamp_file, stamp):
        note(f"recipe and data have not changed: the records in {file} are used again.")
        return
    # An interrupted build must not leave the old stamp beside records or images that it has replaced.
    stamp_file.unlink(missing_ok=True)
    records = build_records(
        recipe, out_dir=folder, split=split, data_root=flags.umed_data_root, progress=True, **options
    )
    for record in records:
        record["image"] = str(folder / record["image"])
    save_records(records, file)
    files.write_json(stamp_file, stamp)
    note(f"built {len(records)} records of {flags.umed_recipe} into {file}")


def _data_stamp(recipe: AnyRecipe, data_root: str | None) -> dict[str, str]:
    """The data's folder and a digest of all that the annotations say and of size and time of every image they name."""
    annotations = read_annotations(recipe, data_root)
    digest = hashlib.sha256(repr((annotations.faults.messages, annotations.missing)).encode())
    for item in annotations.items:
        digest.update(repr((item, file_states(item.image))).encode())
    return {"data_root": str(annotations.root), "data_sha256": digest.hexdigest()}


@contextmanager
def using_template(name: str) -> Iterator[llava_conversation.Conversation]:
    """Make a template LLaVA's default conversation, which its preprocessing reads, for the length of the block."""
    before = llava_conversation.default_conversation
    llava_conversation.default_conversation = conversation_template(name)
    try:
        yield llava_conversation.default_conversation
    finally:
        llava_conversation.default_conversation = before


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
        self.names_records = split == "train" and self.flags.umed_replay > 0
        self._reported: set[int] = set()
        self.augmenter: Augmenter | None = None
        if self.flags.umed_augment and split == "train":
            self.augmenter = Augmenter(training_args.seed, data_args.image_processor)
            if training_args.process_index == 0:
                labelled = int(self.list_data_dict.column("labelled").sum())
                note(augmentation_in_words(labelled, len(self.list_data_dict)))
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
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64  # uniform in 0..1
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
            image = image if self.augmenter is None else self.augmenter.pixels(image, study)
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


def _holds(file: Path, content: Any) -> bool:
    """Whether a JSON file holds this; a damaged one does not."""
    try:
        return bool(files.parse_json(file.read_text(encoding="utf-8")) == content)
    except (OSError, ValueError):
        return False

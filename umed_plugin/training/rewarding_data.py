"""Stage 2's data: queries with ground truth instead of supervised tokens.

A query is a training sample of stage 1, cut off where its answer begins. So both stages, and stock inference, ask the same
question about the same pixels, and the same share of records uses the stock template. With ``--umed_feature_cache``, an image
whose features are on disk is not opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX

from umed_plugin.data.image_files import check_images_to_encode
from umed_plugin.errors import UmedError
from umed_plugin.training.feature_cache import FeatureCache, open_feature_cache
from umed_plugin.training.first_process import first_process_does
from umed_plugin.training.tuning_data import GroundedDataset, tokenize_record


class QueryDataset(GroundedDataset):
    """Records as queries: ``prompt_ids`` [L] with one image token, ``image`` [3, S, S] and the ``record`` itself.

    With a feature cache, ``features`` [P, D] replace the image if they are cached; the other of the two is None.
    ``features_name`` is their name in the cache.
    """

    feature_cache: FeatureCache | None = None

    def use_feature_cache(self, folder: str, tower: Any) -> str:
        """From now on, read the features of ``tower`` from ``folder``; returns a line that summarises the cache.

        Raises:
            UmedError: the tower is trained, the folder has no room for the features of all images, or an image without
                features cannot be read.
        """
        self.feature_cache = open_feature_cache(
            folder, tower, self.data_args.image_processor, self.data_args.image_aspect_ratio
        )
        first_process_does(self._check_images_to_encode, "check the images that the feature cache does not hold")
        return self.feature_cache.reserve(self._features_name(index) for index in range(len(self)))

    def _check_images_to_encode(self) -> None:
        """Before training, as without a cache, but of the images alone that will be opened."""
        if self.data_args.data_path is None or self.image_cache is not None:
            return  # the images of a recipe were read when its records were built
        check_images_to_encode(
            self.list_data_dict,
            self._has_features,
            self.data_args.image_folder,
            f"--data_path {self.data_args.data_path}, without what the feature cache holds",
            skip=self.flags.umed_on_bad_image == "skip",
        )

    def _has_features(self, index: int) -> bool:
        cache, name = self.feature_cache, self._features_name(index)
        return cache is not None and name is not None and cache.file_of(name).is_file()

    def sample(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The query of record ``index`` in an epoch; errors of reading its image pass through."""
        study = self.study(index, epoch)
        record = {**study.record, "augmented": study.as_json()} if study.changed else study.record
        name, features = self._cached(index)
        if features is None:
            item = super().sample(index, epoch)
            ids, labels, image = item["input_ids"], item["labels"], item["image"]
        else:
            (ids, labels), image = tokenize_record(self, index, self.template_of(index)), None
        supervised = (labels != IGNORE_INDEX).nonzero()
        if not len(supervised):
            raise UmedError(
                f"record {record.get('id')}: LLaVA masks its whole answer under template {self.template_of(index)}, so it is "
                "unknown where an answer begins. The template must fit the checkpoint's tokenizer: see --version."
            )
        query = {"prompt_ids": ids[: int(supervised[0])], "image": image, "record": record}
        return query if self.feature_cache is None else {**query, "features": features, "features_name": name}

    def _cached(self, index: int) -> tuple[str | None, torch.Tensor | None]:
        """Name and features of the record's image in the feature cache, each None if there is none."""
        name = self._features_name(index)
        return name, None if self.feature_cache is None or name is None else self.feature_cache.read(name)

    def _features_name(self, index: int) -> str | None:
        path = self.image_path(index)
        if self.feature_cache is None or path is None:
            return None
        return self.feature_cache.name_of(path, self.list_data_dict[index].get("reading"))


def collate_queries(queries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Q queries as one batch; prompts stay a list because they are padded after embedding.

    ``images`` [M, 3, S, S] are those of the M queries without features, None if M is 0. ``features`` and ``features_names`` are
    lists of Q.
    """
    images = [query["image"] for query in queries if query["image"] is not None]
    return {
        "prompt_ids": [query["prompt_ids"] for query in queries],
        "images": torch.stack(images) if images else None,
        "features": [query.get("features") for query in queries],
        "features_names": [query.get("features_name") for query in queries],
        "records": [query["record"] for query in queries],
    }


def make_rewarding_data_module(tokenizer: Any, data_args: Any, training_args: Any) -> dict[str, Any]:
    """What LLaVA's ``make_supervised_data_module`` returns, for stage 2; with ``--umed_val_every`` also held-out queries."""
    data = {
        "train_dataset": QueryDataset(tokenizer, data_args, training_args),
        "eval_dataset": None,
        "data_collator": collate_queries,
    }
    if training_args.umed.umed_val_every:
        data["val_dataset"] = QueryDataset(tokenizer, data_args, training_args, "val")
    return data

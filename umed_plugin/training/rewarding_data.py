"""Stage 2's data: questions with ground truth instead of supervised tokens.

A query is a training sample of stage 1 cut off where its answer begins, so both stages, and stock inference, ask the same
question about the same pixels; the same share of records comes under the stock template. With ``--umed_feature_cache`` an image
whose features are on disk is not opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX

from umed_plugin.errors import UmedError
from umed_plugin.training.feature_cache import FeatureCache, open_cache
from umed_plugin.training.tuning_data import GroundedDataset, tokenize_record


class QueryDataset(GroundedDataset):
    """Records as queries: ``prompt_ids`` [L] with one image token, ``image`` [3, S, S] and the ``record`` itself.

    With a cache, ``features`` [P, D] stand in for the image where it has them (the other of the two is None), and
    ``features_name`` is their name in it.
    """

    cache: FeatureCache | None = None

    def use_cache(self, folder: str, tower: Any) -> str:
        """Read features that ``tower`` has made from ``folder`` from now on; returns a line about what is there.

        Raises:
            UmedError: the tower is trained, or the folder cannot take the features of all images.
        """
        self.cache = open_cache(folder, tower, self.data_args.image_processor, self.data_args.image_aspect_ratio)
        return self.cache.reserve(self._features_name(index) for index in range(len(self)))

    def sample(self, index: int) -> dict[str, Any]:
        """The query of record ``index``; raises what reading its image raises."""
        record = self.list_data_dict[index]
        name, features = self._cached(index)
        if features is None:
            item = super().sample(index)
            ids, labels, image = item["input_ids"], item["labels"], item["image"]
        else:
            (ids, labels), image = tokenize_record(self, index, self.template_of(index)), None
        supervised = (labels != IGNORE_INDEX).nonzero()
        if not len(supervised):
            raise UmedError(
                f"record {record.get('id')}: LLaVA masks its answer whole under template {self.template_of(index)}, so the "
                "place where an answer begins is not known. The template must fit the checkpoint's tokenizer: see --version."
            )
        query = {"prompt_ids": ids[: int(supervised[0])], "image": image, "record": record}
        return query if self.cache is None else {**query, "features": features, "features_name": name}

    def _cached(self, index: int) -> tuple[str | None, torch.Tensor | None]:
        """Name and features of the record's image in the cache, each None where there is none."""
        name = self._features_name(index)
        return name, None if self.cache is None or name is None else self.cache.read(name)

    def _features_name(self, index: int) -> str | None:
        path = self.image_path(index)
        if self.cache is None or path is None:
            return None
        return self.cache.name_of(path, self.list_data_dict[index].get("reading"))


def collate_queries(queries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Q queries as one batch; prompts stay a list because they are padded after embedding.

    ``images`` [M, 3, S, S] are those of the queries without features, None when there are none. ``features`` and
    ``features_names`` are lists of Q.
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
    """What LLaVA's ``make_supervised_data_module`` returns, for stage 2, and the held-out queries if they are asked for."""
    data = {
        "train_dataset": QueryDataset(tokenizer, data_args, training_args),
        "eval_dataset": None,
        "data_collator": collate_queries,
    }
    if training_args.umed.umed_val_every:
        data["val_dataset"] = QueryDataset(tokenizer, data_args, training_args, "val")
    return data

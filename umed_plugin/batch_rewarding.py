"""Stage 2's data: questions with ground truth instead of supervised tokens.

A query is a training sample of stage 1 cut off where its answer begins, so both stages, and stock inference, ask the same
question about the same pixels; the same share of records comes under the stock template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX

from umed_plugin.batch import GroundedDataset
from umed_plugin.errors import UmedError


class QueryDataset(GroundedDataset):
    """Records as queries: ``prompt_ids`` [L] with one image token, ``image`` [3, S, S] and the ``record`` itself."""

    def sample(self, index: int) -> dict[str, Any]:
        """The query of record ``index``; raises what reading its image raises."""
        item, record = super().sample(index), self.list_data_dict[index]
        supervised = (item["labels"] != IGNORE_INDEX).nonzero()
        if not len(supervised):
            raise UmedError(
                f"record {record.get('id')}: LLaVA masks its answer whole under template {self.template_of(index)}, so the "
                "place where an answer begins is not known. The template must fit the checkpoint's tokenizer: see --version."
            )
        return {"prompt_ids": item["input_ids"][: int(supervised[0])], "image": item["image"], "record": record}


def collate_queries(queries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Q queries as one batch; prompts stay a list because they are padded after embedding."""
    return {
        "prompt_ids": [query["prompt_ids"] for query in queries],
        "images": torch.stack([query["image"] for query in queries]),
        "records": [query["record"] for query in queries],
    }


def make_rewarding_data_module(tokenizer: Any, data_args: Any, training_args: Any) -> dict[str, Any]:
    """What LLaVA's ``make_supervised_data_module`` returns, for stage 2."""
    dataset = QueryDataset(tokenizer, data_args, training_args)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collate_queries}

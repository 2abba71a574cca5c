"""Stage 2's data: questions with ground truth instead of supervised tokens.

A query is the prompt up to where the answer begins, under the umed template or, for the same share of records as in stage 1,
the stock one. The image goes through LLaVA's own loading, so both stages and stock inference see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.mm_utils import tokenizer_image_token
from llava.train.train import preprocess_multimodal
from torch import Tensor

from umed_plugin.batch import GroundedDataset
from umed_plugin.conversation import question_prompt
from umed_plugin.geometry import ImageGeometry
from umed_plugin.records import record_geometry


class QueryDataset(GroundedDataset):
    """Records as queries: ``prompt_ids`` [L] with one image token, ``image`` [3, S, S], ``record`` and ``geometry``."""

    def sample(self, index: int) -> dict[str, Any]:
        """The query of record ``index``; raises what reading its image raises."""
        record = self.list_data_dict[index]
        turns = preprocess_multimodal([[dict(record["conversations"][0])]], self.data_args)
        prompt = question_prompt(turns[0][0]["value"], self.template_of(index))
        return {
            "prompt_ids": tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt"),
            "image": self.load_image(index),
            "record": record,
            "geometry": self.geometry_of(record),
        }

    def geometry_of(self, record: dict[str, Any]) -> ImageGeometry:
        """The geometry of a record's image under the model's own image processor and patches."""
        return record_geometry(record, self.data_args.image_processor.crop_size["height"], self.data_args.umed_patch_size)


def collate_queries(queries: Sequence[dict[str, Any]]) -> dict[str, list[Any] | Tensor]:
    """Q queries as one batch; prompts stay a list because they are padded after embedding."""
    return {
        "prompt_ids": [query["prompt_ids"] for query in queries],
        "images": torch.stack([query["image"] for query in queries]),
        "records": [query["record"] for query in queries],
        "geometries": [query["geometry"] for query in queries],
    }

"""Give LLaVA's trainer grounded records (stage 1) or queries to sample answers for (stage 2).

Target: `make_supervised_data_module` in `llava.train.train`.
Why: it can build only LLaVA's own dataset, from one JSON file, with one template for all samples.
Versions: LLaVA 1.2.x.
Delete when: LLaVA's `train()` accepts a dataset from its caller.
"""

from __future__ import annotations

import sys
from typing import Any

from umed_plugin.flags.rules import REWARDING
from umed_plugin.patches import lora_resume
from umed_plugin.patches.training_run import LLAVA, TRAIN
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Rebind the function that `train()` calls."""
    llava_train = sys.modules["llava.train.train"]
    stock = llava_train.make_supervised_data_module

    def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
        run = getattr(data_args, "umed_run", None)
        if run is None or not run.active:
            return stock(tokenizer=tokenizer, data_args=data_args)
        if run.flags.umed_stage == REWARDING:
            from umed_plugin.training.rewarding_data import make_rewarding_data_module

            data = make_rewarding_data_module(tokenizer, data_args, run.training_args)
        else:
            data = _instruction_tuning_data(tokenizer, run)
        lora_resume.check_records(run, data["train_dataset"].list_data_dict)
        return data

    recorder.replace(llava_train, "make_supervised_data_module", make_supervised_data_module)


def _instruction_tuning_data(tokenizer: Any, run: Any) -> dict[str, Any]:
    """Our dataset with LLaVA's collator, after a check of the supervised tokens."""
    from llava.train.train import DataCollatorForSupervisedDataset

    from umed_plugin.training.supervision_check import check_supervision
    from umed_plugin.training.tuning_data import GroundedDataset

    collator = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    if run.flags.umed_attention_loss > 0:
        from umed_plugin.training.attention_loss_data import LesionCollator, LesionDataset

        dataset, collator = LesionDataset(tokenizer, run.data_args, run.training_args), LesionCollator(collator)
    else:
        dataset = GroundedDataset(tokenizer, run.data_args, run.training_args)
    if run.flags.umed_replay > 0:
        from umed_plugin.training.replay import IndexedCollator

        collator = IndexedCollator(collator)
    samples = run.flags.umed_supervision_check_samples
    if samples:
        report = check_supervision(dataset, tokenizer, samples)
        run.say(
            f"supervision check: in {report.records} records under {' and '.join(report.templates)}, exactly the answers "
            f"are supervised ({report.supervised_tokens} tokens)."
        )
    data = {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
    if run.flags.umed_val_every:
        from umed_plugin.training.rewarding_data import QueryDataset

        data["val_dataset"] = QueryDataset(tokenizer, run.data_args, run.training_args, "val")
    return data


PATCH = Patch(
    name="data_module",
    targets=(
        TRAIN,
        Target(
            "llava.train.train:make_supervised_data_module",
            LLAVA,
            ("1096cc70375a2cb64476a1ad95924a78f9197dcb9a1cf3c5a250bb81297c1afa",),
        ),
        Target(
            "llava.train.train:LazySupervisedDataset",
            LLAVA,
            ("bbe4f33ff1eb9a58fbfcdaf65593b1a41550b89c9140edd4fc826de38b195307",),
        ),
        Target(
            "llava.train.train:preprocess", LLAVA, ("78e406b80f5701892f0356b8f6394057349c82098f966b36186f2bfcc2619726",)
        ),
    ),
    why="LLaVA builds only its own dataset, from one JSON file with one template",
    delete_when="LLaVA's train() accepts a dataset from its caller",
    change=change,
)

"""A tokenizer trained on the spot and the dataset of stage 1, without a training run."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import sentencepiece
from transformers import CLIPImageProcessor

from umed_plugin.commands.demo.tiny_checkpoint import write_tokenizer
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.training.tuning_data import GroundedDataset

CORPUS = [
    "USER: Is there anything abnormal? ASSISTANT: There is one abnormal area at [0.12, 0.20, 0.35, 0.40]. It is a nodule.",
    "[INST] Where is it? [/INST] At the top left. A chat between a curious human and an artificial intelligence assistant.",
    "You read medical images: say what is abnormal, mark it as [x1, y1, x2, y2] in 0-1, then name it. <<SYS>> <</SYS>>",
] * 20


def make_tokenizer(folder, *, legacy=True, symbols=("USER",)):
    """A LlamaTokenizer over a sentencepiece model trained here; like Llama's it has a piece USER but no ▁USER."""
    model = io.BytesIO()
    inside_words = [f"super{symbol} in a{symbol}" for symbol in symbols] * 100
    # Where it is no piece, its letters are single.
    corpus = [line.replace("USER", "USER" if symbols else "U S E R") for line in CORPUS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus, *inside_words]),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / f"{legacy}-{len(symbols)}"
    path.mkdir(exist_ok=True)
    tokenizer = write_tokenizer(path, model.getvalue(), legacy=legacy, longest=512)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def make_dataset(
    records,
    tokenizer,
    version="umed_v1",
    image_aspect_ratio="pad",
    split="train",
    kind=GroundedDataset,
    rank=0,
    **flags,
):
    """A GroundedDataset, or one of another kind, as a run would make it, with a 64 px image processor and 8 px patches."""
    data_args = SimpleNamespace(
        data_path=str(records),
        image_folder=str(records.parent),
        image_aspect_ratio=image_aspect_ratio,
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        umed_num_patches=64,
        umed_run=SimpleNamespace(model_args=SimpleNamespace(version=version)),
    )
    training_args = SimpleNamespace(
        umed=UmedFlags(**{"umed_stage": "instruction_tuning", **flags}),
        output_dir=str(records.parent / "out"),
        seed=0,
        process_index=rank,
        main_process_first=lambda **_: contextlib.nullcontext(),
    )
    return kind(tokenizer, data_args, training_args, split)

"""Time of questions about one image that share its encoding and KV cache, compared with questions that share nothing.

``python benchmarks/evaluating.py [--images 4] [--questions 11]``: SLAKE has 11 English test questions per image, VQA-RAD a little
more than 2. The model has LLaVA's 576 image tokens, a tower of 24 x 24 patches and a language model of 6 layers of width 256, in
float32. Both sides answer the same questions greedily in batches of the same size. The other side encodes the image and computes
the whole prompt for each question, which LLaVA-Med's script does one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ratios, seconds, stack
from PIL import Image

from umed_plugin.patches import prepare_llava

WORDS = ("What", "is", "the", "organ", "lesion", "left", "right", "shown", "in", "this", "image", "normal", "where")


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--questions", type=int, default=11, help="about each image")
    parser.add_argument("--batch-size", type=int, default=22)
    parser.add_argument("--max-new-tokens", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    prepare_llava()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(args, Path(folder))))


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from umed_plugin.commands.demo import tiny_checkpoint
    from umed_plugin.model.answerer import Answerer, AnswererSettings, ImageQuestion

    tiny_checkpoint.IMAGE_SIZE = 24 * tiny_checkpoint.PATCH_SIZE
    made = tiny_checkpoint.make_checkpoint(folder / "llava-mistral", hidden_size=256, layers=6)
    answerer = Answerer(made, AnswererSettings(device="cpu", max_new_tokens=args.max_new_tokens))
    for layer in answerer.llava.get_model().layers:  # sharp attention: answers that depend on image and question
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            projection.weight.data *= 6
    rng = np.random.default_rng(0)
    asks = []
    for index in range(args.images):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 255, (192, 192, 3), dtype=np.uint8)).save(path)
        asks += [
            ImageQuestion(str(path), " ".join(rng.choice(WORDS, rng.integers(4, 16)))) for _ in range(args.questions)
        ]
    batches = [asks[start : start + args.batch_size] for start in range(0, len(asks), args.batch_size)]

    def shared() -> list[str]:
        return [answer.text for batch in batches for answer in answerer.answer(batch)]

    def alone() -> list[str]:
        return [text for batch in batches for text in _one_by_one(answerer, batch)]

    equal = sum(a == b for a, b in zip(shared(), alone()))
    times = [(seconds(alone), seconds(shared)) for _ in range(args.repetitions)]
    return {
        "answers": len(asks),
        "equal_answers": equal,
        "different_answers": len(set(shared())),
        **ratios(*zip(*times)),
        "settings": {key: value for key, value in vars(args).items() if key != "repetitions"},
        "stack": stack(),
    }


def _one_by_one(answerer: Any, batch: list[Any]) -> list[str]:
    from umed_plugin.model.forward import decode_answers, embed_prompts
    from umed_plugin.model.sampling import SamplingSettings, generate

    with torch.no_grad():
        features = answerer.features([ask.image for ask in batch], [None] * len(batch))
        prompts = embed_prompts(answerer.model, [answerer.prompt_ids(ask.text) for ask in batch], features)
        eos, limit = answerer.tokenizer.eos_token_id, answerer.max_new_tokens
        answers = generate(
            answerer.model, prompts, SamplingSettings(max_new_tokens=limit, temperature=0.0, eos_token_id=eos)
        )
    return decode_answers(answerer.tokenizer, answers)


if __name__ == "__main__":
    main()

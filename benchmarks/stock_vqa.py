"""Stock LLaVA's own ``llava.eval.model_vqa`` in a process that cannot import the plugin.

Only the device is swapped: LLaVA's evaluation hard-codes CUDA and half precision, so on a machine without a GPU tensors stay on
the CPU in float32. Imports nothing of this project.

    python -I benchmarks/stock_vqa.py '{"model_path": ..., "image_folder": ..., "question_file": ..., "answers_file": ...}'
"""

import argparse
import json
import sys

sys.modules["umed_plugin"] = None  # from here on, importing the plugin is an ImportError

import torch
from llava.eval import model_vqa
from llava.model.builder import load_pretrained_model


def load_on_cpu(*arguments):
    """Stock loading, then float32: a CPU cannot compute in half precision."""
    tokenizer, model, processor, length = load_pretrained_model(*arguments, device="cpu")
    return tokenizer, model.float(), processor, length


def main() -> None:
    """Answer the questions greedily under LLaVA's own template."""
    try:
        import umed_plugin  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("the plugin can be imported: this process does not show what stock LLaVA does")
    if not torch.cuda.is_available():
        model_vqa.load_pretrained_model = load_on_cpu
        torch.Tensor.cuda = lambda self, *_: self
        torch.Tensor.half = lambda self: self.float()
    stock = {"model_base": None, "num_chunks": 1, "chunk_idx": 0, "temperature": 0, "top_p": None, "num_beams": 1}
    model_vqa.eval_model(argparse.Namespace(**{**stock, "conv_mode": "mistral_instruct", **json.loads(sys.argv[1])}))


if __name__ == "__main__":
    main()

"""Stock LLaVA's own ``llava.eval.model_vqa`` in a process that cannot import the plugin.

Only the device is swapped: LLaVA's evaluation hard-codes CUDA and half precision, so on a machine without a GPU tensors stay on
the CPU in float32. Uses nothing of this project.

    python -I benchmarks/stock_vqa.py '{"model_path": ..., "image_folder": ..., "question_file": ..., "answers_file": ...}'
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def forbid_the_plugin() -> None:
    """Make every import of the plugin fail from here on, and see that it does."""
    sys.modules["umed_plugin"] = None  # type: ignore[assignment]
    try:
        import umed_plugin  # noqa: F401
    except ImportError:
        return
    raise SystemExit("the plugin can be imported: this process does not show what stock LLaVA does")


def stay_on_the_cpu(model_vqa: Any) -> None:
    """Let LLaVA's evaluation run without CUDA."""
    import torch
    from llava.model.builder import load_pretrained_model

    def load_on_cpu(*arguments: Any) -> tuple[Any, Any, Any, Any]:
        tokenizer, model, processor, length = load_pretrained_model(*arguments, device="cpu")
        return tokenizer, model.float(), processor, length

    model_vqa.load_pretrained_model = load_on_cpu
    torch.Tensor.cuda = lambda self, *_: self
    torch.Tensor.half = lambda self: self.float()


def main() -> None:
    """Answer the questions greedily under LLaVA's own template."""
    forbid_the_plugin()
    import torch
    from llava.eval import model_vqa

    if not torch.cuda.is_available():
        stay_on_the_cpu(model_vqa)
    stock = {"model_base": None, "num_chunks": 1, "chunk_idx": 0, "temperature": 0, "top_p": None, "num_beams": 1}
    model_vqa.eval_model(argparse.Namespace(**{**stock, "conv_mode": "mistral_instruct", **json.loads(sys.argv[1])}))


if __name__ == "__main__":
    main()

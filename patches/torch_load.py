"""Load pickles of a checkpoint without executing code in them.

Target: `torch.load`, only for calls from LLaVA, transformers and peft.
Why: ``non_lora_trainables.bin``, ``mm_projector.bin``, ``pytorch_model.bin``, optimizer and scheduler states are pickles, and a
pickle from the internet can execute any code. torch before 2.6 loads them without a check.
Versions: torch 2.0 and 2.1.
Delete when: LLaVA's torch is 2.6 or newer and transformers loads its RNG states under that default.

``rng_state*.pth`` contains NumPy's generator state, which ``weights_only`` refuses. These files go through an unpickler that
allows only tensors and NumPy arrays.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any

from umed_plugin.errors import UmedError
from umed_plugin.patching import Patch, Recorder, Target

CALLERS = ("llava", "transformers", "peft")
_PLAIN = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "ByteStorage"),
    ("torch.storage", "UntypedStorage"),
}


def change(recorder: Recorder) -> None:
    """Wrap `torch.load`."""
    import torch

    stock = torch.load

    def load(f: Any, *args: Any, **keywords: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if caller not in CALLERS or "weights_only" in keywords or "pickle_module" in keywords or len(args) > 1:
            return stock(f, *args, **keywords)
        name = os.fspath(f) if isinstance(f, (str, os.PathLike)) else getattr(f, "name", "a stream")
        try:
            if os.path.basename(name).startswith("rng_state"):
                return stock(f, *args, pickle_module=_ArraysOnly, **keywords)
            return stock(f, *args, weights_only=True, **keywords)
        except pickle.UnpicklingError as error:
            raise UmedError(
                f"{name}: contains more than plain tensors, so loading it could execute code in it ({error}). If you trust its "
                "source, load it once in a separate Python and save only its tensors: "
                "torch.save({k: v for k, v in torch.load(F).items()}, F)."
            ) from error

    recorder.replace(torch, "load", load)


class _ArraysOnly:
    """The part of a pickle module that `torch.load` uses, with an unpickler for tensors and NumPy arrays only."""

    class Unpickler(pickle.Unpickler):
        """Refuses every name outside a short list."""

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _PLAIN:
                raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of RNG states")
            return super().find_class(module, name)

    @classmethod
    def load(cls, file: Any, **keywords: Any) -> Any:
        """`pickle.load` with the unpickler above."""
        return cls.Unpickler(file, **keywords).load()


PATCH = Patch(
    name="torch_load",
    targets=(
        Target(
            "torch:load",
            ">=2.0,<2.2",
            (
                "e0a4e1a1c1f02b08932343adbc63aae006b769a4cf9fdf47490cdf156663a1ac",
                "c5092039bf85e2a8b052806deddd1f40ff03a02309bc15b09afbfc173717bbba",
            ),
        ),
    ),
    why="checkpoint pickles (projector, non-LoRA weights, optimizer) can execute any code when loaded",
    delete_when="LLaVA's torch is 2.6 or newer",
    change=change,
    needed=("torch", "<2.6"),
)

"""The one door through which pickles are loaded. No code in them runs.

A pickle calls whatever functions it names. The door does three things, with every version of PyTorch:

1. It refuses files that are programs by their nature: TorchScript archives and the tar archives of old PyTorch. `torch.load` runs
   the first before it looks at ``weights_only``.
2. It loads with ``weights_only=True``, whatever its caller asked for.
3. States of a training run hold a little more: NumPy's generator, DeepSpeed's loss scaler. They are loaded by an unpickler that
   knows a short list of such classes, and nothing else.

`load_pickle` is the door for this package. The patch `torch_load` puts it before `torch.load` for LLaVA and the libraries that it
calls. `check_plain` is for files that another library will open: it refuses them before that library is called. `behind_the_door`
is a second wall around that call, for a program that applied no patch.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from umed_plugin.checkpoints.pickles import printable, read_pickle, refuse_program
from umed_plugin.checkpoints.stored import BadFile, read_safetensors, refuse_placeholder
from umed_plugin.errors import UmedError
from umed_plugin.patching import original

# What states of training runs name beyond plain tensors. None of these calls anything that is passed to it.
_STATES = {
    ("_codecs", "encode"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "int"),
    ("builtins", "float"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy", "float64"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "ByteStorage"),
    ("torch.storage", "UntypedStorage"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
}
_ADVICE = (
    "It was not loaded. Get the checkpoint as safetensors, or from its publisher again. If you trust its source, load it once in "
    "a Python without credentials or network, and save only its tensors."
)
_SHOWN = 5
# Whose calls of `torch.load` go through the door: LLaVA's, and those of the libraries that it calls.
CALLERS = ("llava", "transformers", "peft", "accelerate", "deepspeed", "umed_plugin")
_ONE_AT_A_TIME = threading.RLock()


def load_pickle(file: Path | str, map_location: Any = "cpu") -> Any:
    """Load a file written by `torch.save`: tensors, and containers of them.

    Args:
        file: the file.
        map_location: as for `torch.load`.

    Raises:
        UmedError: it holds more than plain tensors, or cannot be read.

    Example:
        >>> import tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "mm_projector.bin"
        >>> torch.save({"bias": torch.zeros(2)}, file)
        >>> load_pickle(file)
        {'bias': tensor([0., 0.])}
    """
    import torch

    return load_through(original(torch, "load"), Path(file), map_location=map_location)


def with_door(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``stock``, which is `torch.load`, with the door before it for `CALLERS`. Other callers load as they please."""

    def load(f: Any, *args: Any, **keywords: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return load_through(stock, f, *args, **keywords) if caller in CALLERS else stock(f, *args, **keywords)

    return load


@contextmanager
def behind_the_door() -> Iterator[None]:
    """Put the door before `torch.load` while another library opens weight files, whether or not the patch is applied."""
    import torch

    with _ONE_AT_A_TIME:
        before, during = torch.load, with_door(original(torch, "load"))
        torch.load = during
        try:
            yield
        finally:
            # LLaVA may be imported meanwhile, and the patch applied over this one.
            if torch.load is during:
                torch.load = before


def load_through(stock: Callable[..., Any], f: Any, *args: Any, **keywords: Any) -> Any:
    """Call ``stock``, which is `torch.load`, so that no code in the file runs.

    Args:
        stock: `torch.load` itself.
        f: a path or a binary stream, as for `torch.load`.
        args: at most ``map_location`` is passed on.
        keywords: as for `torch.load`; ``weights_only`` and ``pickle_module`` are replaced.

    Raises:
        UmedError: the file holds more than tensors and states of a training run, or cannot be read.
    """
    name = _name_of(f)
    passed = {key: value for key, value in keywords.items() if key not in ("weights_only", "pickle_module")}
    start = None if isinstance(f, (str, os.PathLike)) else f.tell()
    _refuse_programs(f, name)
    try:
        return stock(f, *args[:1], weights_only=True, **passed)
    except pickle.UnpicklingError as error:
        if start is not None:
            f.seek(start)
        return _load_state(stock, f, name, args[:1], passed, error)
    except (EOFError, RuntimeError, ValueError) as error:
        raise UmedError(
            f"{name}: cannot be read as a PyTorch file ({_first_line(error)}). Copy or download it again."
        ) from error


def _load_state(
    stock: Callable[..., Any], f: Any, name: str, args: tuple, keywords: dict[str, Any], refusal: pickle.UnpicklingError
) -> Any:
    """Load the state of a training run, after ``weights_only`` refused it."""
    try:
        return stock(f, *args, weights_only=False, pickle_module=_StatesOnly, **keywords)
    except pickle.UnpicklingError as error:
        if not isinstance(error, _Refused):
            error = refusal
        found = str(error) if isinstance(error, _Refused) else "its pickle is damaged or of another kind"
        raise UmedError(
            f"{name}: holds more than plain tensors ({found}), so loading it could run code. {_ADVICE}"
        ) from None
    except (AttributeError, EOFError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UmedError(
            f"{name}: cannot be read as a PyTorch file ({_first_line(error)}). Copy or download it again."
        ) from error


class _Refused(pickle.UnpicklingError):
    """A pickle names what is not in the list."""


class _StatesOnly:
    """The part of a pickle module that `torch.load` uses, with an unpickler for tensors and states of a training run only."""

    class Unpickler(pickle.Unpickler):
        """Refuses every name outside the list."""

        def find_class(self, module: str, name: str) -> Any:
            from torch import _weights_only_unpickler

            plain = _weights_only_unpickler._get_allowed_globals()
            if f"{module}.{name}" in plain:
                return plain[f"{module}.{name}"]
            if (module, name) not in _STATES:
                raise _Refused(printable(f"{module}.{name}"))
            return super().find_class(module, name)

    @classmethod
    def load(cls, file: Any, **keywords: Any) -> Any:
        """`pickle.load` with the unpickler above."""
        return cls.Unpickler(file, **keywords).load()


def check_plain(files: Iterable[Path]) -> None:
    """Refuse weight files that another library will open, if they are not plain tensors.

    Raises:
        UmedError: a pickle names more than tensors, or a file cannot be read; all such files.
    """
    faults = [fault for fault in map(_fault_of, files) if fault]
    if faults:
        raise UmedError("\n".join(faults))


def _fault_of(file: Path) -> str | None:
    try:
        if file.suffix == ".safetensors":
            read_safetensors(file)
            return None
        foreign = read_pickle(file).foreign
    except BadFile as error:
        return f"{file}: {error.found}. {_ADVICE}"
    if not foreign:
        return None
    names = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
    return f"{file}: holds more than plain tensors ({names}), so loading it could run code. {_ADVICE}"


def _refuse_programs(f: Any, name: str) -> None:
    """Raise for a TorchScript or tar archive, before `torch.load` sees it. A stream is left where it was."""
    try:
        if isinstance(f, (str, os.PathLike)):
            if os.path.isfile(f):
                refuse_placeholder(Path(f))
            with open(f, "rb") as stream:
                refuse_program(stream)
        else:
            _refuse_program_in(f)
    except BadFile as error:
        raise UmedError(f"{name}: {error.found}. {_ADVICE}") from None


def _refuse_program_in(stream: IO[bytes]) -> None:
    """`refuse_program` for a stream that may begin in the middle of a file."""
    start = stream.tell()
    try:
        refuse_program(stream if start == 0 else io.BytesIO(stream.read()))
    finally:
        stream.seek(start)


def _name_of(f: Any) -> str:
    return os.fspath(f) if isinstance(f, (str, os.PathLike)) else str(getattr(f, "name", "a stream"))


def _first_line(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0][:200])

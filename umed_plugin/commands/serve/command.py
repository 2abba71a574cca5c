"""``umed serve``: a local chat page for a checkpoint that draws boxes and heat maps on the image."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umed_plugin.commands.machine import add_dtype_flag
from umed_plugin.commands.similar_flags import add_similar_flags, check_similar_flags
from umed_plugin.errors import UsageError, say

_SECONDS_TO_END = 20
# mallopt's name for the smallest block that is taken from the system alone, and so given back when it is freed.
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**22


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``serve``."""
    parser = subparsers.add_parser(
        "serve",
        help="a local chat page with boxes and heat maps",
        description="Chat with a checkpoint about PNG, JPEG, DICOM or NIfTI images on a local page. Choose slice and window; see "
        "the answer, its boxes, and heat maps of its words. Images stay on this machine and are removed at the end.",
        epilog="examples:\n  umed serve runs/demo/checkpoint/llava-mistral-umed\n"
        "  umed serve checkpoints/llava-mistral-stage2 --compare checkpoints/llava-mistral-stage1",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint, or a LoRA folder")
    parser.add_argument(
        "--base", metavar="CKPT", type=Path, help="base of a LoRA folder (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--compare",
        metavar="CKPT",
        type=Path,
        help="a second checkpoint: each question goes to both, and their answers stand side by side. Both are in memory",
    )
    parser.add_argument(
        "--template",
        help="prompt template of each checkpoint, e.g. mistral_instruct to prompt as stock LLaVA does (default: by model)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8470, help="port to listen on (default: 8470; 0: any free port)")
    parser.add_argument(
        "--upload-mb", metavar="MB", type=int, default=1024, help="maximum size of one upload (default: 1024)"
    )
    parser.add_argument(
        "--megapixels",
        metavar="N",
        type=int,
        default=16,
        help="maximum size of one slice or picture, in millions of pixels; each needs about 10 MB of memory (default: 16)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="maximum tokens of an answer (default: 256)"
    )
    add_similar_flags(parser, "needed with --similar")
    add_dtype_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and serve until Ctrl-C."""
    from umed_plugin.checkpoints.folder import check_base, is_lora
    from umed_plugin.checkpoints.prompt_templates import check_template
    from umed_plugin.patches import prepare_llava

    for flag in ("upload_mb", "megapixels", "max_new_tokens"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}. Allowed: 1 or more.")
    check_similar_flags(args)
    if args.similar and args.similar_from is None:
        raise UsageError(
            f"--similar {args.similar}: name a recipe or records with the training studies: --similar-from."
        )
    if not 0 <= args.port < 2**16:
        raise UsageError(f"--port is {args.port}. Allowed: 0 to 65535.")
    check_template(args.template)
    checkpoints = [args.checkpoint] if args.compare is None else [args.checkpoint, args.compare]
    check_base(args.base, *checkpoints)
    names = names_of(checkpoints)
    give_large_blocks_back()
    prepare_llava()
    _keep_headers_out_of_the_terminal()

    from umed_plugin.commands.serve.dialogue import Dialogue
    from umed_plugin.commands.serve.shelf import Shelf

    dialogues = []
    for checkpoint in checkpoints:
        say(f"umed serve: loading {checkpoint}")
        base = args.base if is_lora(checkpoint) else None
        dialogues.append(Dialogue(checkpoint, base, args.template, args.max_new_tokens, args.dtype))
        if args.similar:
            dialogues[-1].look_up(args.similar, args.similar_from)
    shelf = Shelf(args.upload_mb * 10**6, args.megapixels)
    # Service managers stop with SIGTERM; the images must be removed then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _serve(args, dialogues, names, shelf)
    finally:
        shelf.close()
    return 0


def give_large_blocks_back() -> None:
    """Return each large block of memory to the system as soon as it is freed.

    After the first images, glibc keeps blocks of up to 32 MB for each thread, and every request has a thread of its own. Other C
    libraries may lack the setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """The folders' names; of two with the same name, as much of their paths as tells them apart."""
    paths = [checkpoint.resolve() for checkpoint in checkpoints]
    if len(set(paths)) < len(paths):
        raise UsageError(f"--compare {checkpoints[1]}: is the checkpoint that is served already. Give another one.")
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _serve(args: argparse.Namespace, dialogues: Any, names: Sequence[str], shelf: Any) -> None:
    from umed_plugin.commands.serve.server import ChatServer
    from umed_plugin.data.templates import QUESTIONS
    from umed_plugin.errors import UmedError, warn
    from umed_plugin.remote.settings import is_loopback

    about = {
        "checkpoints": names,
        "upload_mb": args.upload_mb,
        "questions": [QUESTIONS[0], QUESTIONS[2]],
    }
    try:
        server = ChatServer(args.host, args.port, dialogues, shelf, about)
    except OSError as error:
        raise UmedError(
            f"--host {args.host} --port {args.port}: cannot listen there ({error.strerror or error}). Choose another address or "
            "port; --port 0 takes any free port."
        ) from error
    if not is_loopback(args.host):
        warn(
            f"{args.host} can be reached from other machines. Anyone on that network can use the model, and "
            "images are sent unencrypted. An ssh tunnel to 127.0.0.1 is safer."
        )
    say(f"umed serve: {server.url} (Ctrl-C stops it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("umed serve: stopping")
    finally:
        server.end(_SECONDS_TO_END)


def _keep_headers_out_of_the_terminal() -> None:
    """Silence the image libraries: their warnings quote header values, which may include a patient's name."""
    for name in ("pydicom", "nibabel", "PIL", "monai"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")

"""What several test files share: small checkpoints made on the spot, and the folder of real images where there is one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from umed_plugin import patching
from umed_plugin.patches import STACK, prepare_llava

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background ignores Ctrl-C for them and all their children; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
prepare_llava()


@pytest.fixture(scope="module", autouse=True)
def llava_on_these_libraries() -> None:
    """What `prepare_llava` has done again: tests of patches take all of them back, and others may run after them."""
    patching.apply([patch for patch in STACK if patch.trigger in sys.modules])


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``llava_mistral`` checkpoint with random weights; read-only for tests: copy it before changing it."""
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava-mistral", family="mistral")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``llava_llama`` checkpoint with random weights; read-only for tests: copy it before changing it."""
    from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava-llama", family="llama")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and annotations that the environment variable ``UMED_REAL_DATA`` names."""
    folder = os.environ.get("UMED_REAL_DATA")
    if not folder:
        pytest.skip("UMED_REAL_DATA is not set: it names the folder with the real images that this test reads")
    return Path(folder)

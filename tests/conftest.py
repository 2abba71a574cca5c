"""Fixtures that several folders share: small checkpoints made on the spot, real LLaVA models, and the folder of real images."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import budget, needs
from support.umed_runs import accelerate_settings

from umed_plugin import patching
from umed_plugin.patches import STACK, prepare_llava

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some machines forbid bytecode. Each of hundreds of processes would compile the package anew, as long as a tiny training takes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell that starts the tests in the background ignores Ctrl-C for them and all their children; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
prepare_llava()
LLAVA = needs.llava_is_installed()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch and LLaVA, modules that import them are left out before they are imported."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and not LLAVA and needs.file_needs_llava(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs LLaVA and what trains, before ``-m`` selects; skip the first where LLaVA is missing. Slow files first."""
    items.sort(key=budget.place)
    for item in items:
        functions = needs.functions_of(item)
        if any(needs.function_trains(*place) for place in functions):
            item.add_marker("run")
        if needs.file_needs_llava(item.path) or any(needs.function_needs_llava(*place) for place in functions):
            item.add_marker("llava")
        if not LLAVA and item.get_closest_marker("llava"):
            item.add_marker(pytest.mark.skip(reason="torch and LLaVA are not installed in this environment"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Say what to do about a test that needs LLaVA through a lazy import of the library, which no marker tells yet."""
    report = yield
    missing = call.excinfo and isinstance(call.excinfo.value, ModuleNotFoundError) and call.excinfo.value.name
    if missing in needs.LIBRARIES and not LLAVA:
        report.sections.append(("remedy", f"{item.name} needs {missing}: mark it with @pytest.mark.llava"))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After the whole suite: the time that each folder took, beside its budget."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "duration")]
        terminalreporter.section("budget of all workers together")
        terminalreporter.write_line("\n".join(budget.table(reports)))


@pytest.fixture(scope="module", autouse=True)
def llava_on_these_libraries() -> None:
    """What `prepare_llava` has done again: tests of patches take all of them back, and others may run after them."""
    patching.apply([patch for patch in STACK if patch.trigger in sys.modules])


@pytest.fixture(autouse=True)
def accelerate_settings_are_taken_back() -> Iterator[None]:
    """transformers 4 writes ``--bf16`` of arguments that it parses into the environment: later runs would train in bf16."""
    before = accelerate_settings()
    yield
    for name in accelerate_settings():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_searched() -> None:
    """Let garbage collection pass over what is imported: transformers starts one for each model it loads, of 0.4 s otherwise."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="module", params=["mistral", "llama"])
def loaded(request: pytest.FixtureRequest, tiny_mistral: Path, tiny_llama: Path) -> tuple[Any, Any]:
    """(tokenizer, LLaVA model in float32) with random weights; copy the model before changing it."""
    from support.llava_models import load

    return load({"mistral": tiny_mistral, "llama": tiny_llama}[request.param])


@pytest.fixture(scope="module")
def batch(loaded: tuple[Any, Any]) -> tuple[list[Any], Any]:
    """Three prompts of different lengths, so that padding is at work, and three images."""
    from support.llava_models import prompts_and_images

    return prompts_and_images(*loaded)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LlamaTokenizer over a small sentencepiece model."""
    from support.tuning import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A JSON file of eight records with two questions each, beside their images."""
    from support.records import write_records

    return write_records(tmp_path / "data", questions=2)

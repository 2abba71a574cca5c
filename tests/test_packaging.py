"""What an installation puts where: wheel, sdist and editable, and what it leaves alone in a LLaVA environment.

Everything is built from a copy of the tree, with one set of build tools, and installed without dependencies into throw-away
environments. The two tests about LLaVA's pins ask pip what it would do and install nothing.
"""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import importlib.resources, pathlib, sys
import umed_plugin, umed_plugin.patches, umed_plugin.data_recipes
assert umed_plugin.__version__ == sys.argv[1], umed_plugin.__version__
assert pathlib.Path(umed_plugin.__file__).resolve().is_relative_to(pathlib.Path(sys.argv[2]).resolve()), umed_plugin.__file__
assert [f for f in importlib.resources.files("umed_plugin.data_recipes").iterdir() if f.name.endswith(".yaml")]
assert (pathlib.Path(umed_plugin.__file__).parent / "site" / "sitecustomize.py").is_file()
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # What is installed is tested, not a checkout that the caller has put on the path.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=cwd, env=env
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "umed_plugin" / "__init__.py").read_text()).group(1)


def python_in(environment: Path) -> Path:
    return environment / "bin" / "python"


def empty_environment(folder: Path) -> Path:
    """An environment without pip, and the Python in it; the pip of the running one installs into it from outside."""
    venv.create(folder, with_pip=False, symlinks=True)
    return python_in(folder)


def install(python: Path, *what: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", *what)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what belongs to the package, as a build writes into the tree it builds."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    for folder in ("umed_plugin", "patches", "data_recipes"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the build tools that pyproject.toml asks for: the one download of these tests."""
    folder = tmp_path_factory.mktemp("builder")
    venv.create(folder, with_pip=True, symlinks=True)
    run(python_in(folder), "-m", "pip", "install", "-q", "setuptools>=77", "wheel")
    return python_in(folder)


def build_wheel(builder: Path, source: Path, out: Path) -> Path:
    run(builder, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(builder: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(builder, source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(builder: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(builder, "-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})", cwd=source)
    (archive,) = out.glob("*.tar.gz")
    return archive


def files_of_the_tree() -> set[str]:
    """Every file below the three folders of the package, by the name it must have when installed."""
    places = {
        "umed_plugin": "umed_plugin",
        "patches": "umed_plugin/patches",
        "data_recipes": "umed_plugin/data_recipes",
    }
    return {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.mark.run
def test_the_wheel_holds_the_package_whole_and_no_other_top_level_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"umed_plugin", f"umed_plugin-{version()}.dist-info"}
    assert {name for name in names if name.startswith("umed_plugin/")} == files_of_the_tree()
    assert "umed_plugin/site/sitecustomize.py" in names
    assert [name for name in names if re.fullmatch(r"umed_plugin/data_recipes/\w+\.yaml", name)]


@pytest.mark.run
def test_the_wheel_has_both_commands_and_the_licence(wheel: Path) -> None:
    info = f"umed_plugin-{version()}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/entry_points.txt").decode().split() == [
            *("[console_scripts]", "umed", "=", "umed_plugin.cli:main"),
            *("umed-run", "=", "umed_plugin.launch:main"),
        ]
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


@pytest.mark.run
def test_a_wheel_installs(wheel: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path)
    install(python, wheel)
    run(python, "-c", IMPORTS, version(), tmp_path, cwd=tmp_path)
    assert (tmp_path / "bin" / "umed").is_file() and (tmp_path / "bin" / "umed-run").is_file()


@pytest.mark.run
def test_an_sdist_installs(builder: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    built = build_wheel(builder, tmp_path / sdist.name[: -len(".tar.gz")], tmp_path / "wheel")
    python = empty_environment(tmp_path / "environment")
    install(python, built)
    run(python, "-c", IMPORTS, version(), tmp_path / "environment", cwd=tmp_path)


@pytest.mark.run
def test_an_editable_installation_works_from_another_folder(builder: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "source", symlinks=True)
    run(builder, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", copy)
    run(builder, "-c", IMPORTS, version(), copy, cwd=tmp_path)
    (copy / "patches" / "added.py").write_text("answer = 42\n")
    run(builder, "-c", "import umed_plugin.patches.added", cwd=tmp_path)


@pytest.mark.parametrize("module", ["umed_plugin", "umed_plugin.launch", "umed_plugin.patches"])
def test_what_every_python_under_umed_run_imports_needs_the_standard_library_alone(module: str) -> None:
    """Without site-packages: this holds in a Python that has neither LLaVA nor our requirements, too."""
    run(sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}")


# Imported only where they are installed, behind a test of that.
# datasets comes with TRL, which umed_plugin.rewards.trl is for. flash_attn is called by models that were loaded with it.
OPTIONAL = {"datasets", "deepspeed", "flash_attn", "openai", "wandb"}


# LLaVA's pins -------------------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def llava_brings() -> dict[str, metadata.Distribution]:
    """LLaVA and every installed package that it requires, directly or through others."""
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    wanted = [("llava-torch", "")]
    seen = set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an optional extra that is not installed
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(normal(requirement.name), each) for each in ("", *requirement.extras)]
    return found


def would_install(python: str | Path, wheel: Path, report: Path) -> dict[str, str]:
    """What pip would install for the wheel into the environment of ``python``: name to version."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--dry-run", "--report", report, wheel)
    planned = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {normal(item["name"]): item["version"] for item in planned}


def llava_has_its_pins() -> bool:
    from packaging.requirements import Requirement

    try:
        wanted = map(Requirement, metadata.requires("llava-torch") or [])  # written torch==2.0.1 or torch (==2.0.1)
    except metadata.PackageNotFoundError:
        return False
    (torch,) = (requirement for requirement in wanted if requirement.name == "torch")
    return torch.specifier.contains(metadata.version("torch"))


beside_llavas_pins = pytest.mark.skipif(not llava_has_its_pins(), reason="LLaVA is not here with its pins")


@pytest.mark.run
@beside_llavas_pins
def test_beside_llava_alone_pip_adds_packages_and_changes_none(wheel: Path, tmp_path: Path) -> None:
    """An environment as ``pip install llava-torch`` leaves it, as far as pip can see: the metadata of what that brings."""
    brought = llava_brings()
    assert brought["llava-torch"].version == "1.2.2.post1" and len(brought) > 50
    python = empty_environment(tmp_path / "llava")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in brought.values():
        shutil.copytree(distribution._path, site / distribution._path.name)

    planned = would_install(python, wheel, tmp_path / "report.json")

    assert planned.pop("umed-plugin") == version()
    assert {"monai", "nibabel", "pydicom"} <= set(planned)
    assert not set(planned) & set(brought), "packages that LLaVA brings would be replaced"


@pytest.mark.run
@beside_llavas_pins
def test_in_the_running_environment_pip_would_install_the_plugin_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    assert set(would_install(sys.executable, wheel, tmp_path / "report.json")) <= {"umed-plugin"}


@beside_llavas_pins
def test_nothing_that_llava_pins_is_installed_in_another_version() -> None:
    from packaging.requirements import Requirement

    for line in metadata.requires("llava-torch") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            assert requirement.specifier.contains(metadata.version(requirement.name)), line


@beside_llavas_pins
@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 cannot say which names its standard library has")
def test_every_import_is_a_requirement_or_comes_with_llava() -> None:
    """A module that is imported anywhere in the package is there in an environment with LLaVA and the plugin alone."""
    imported = set()
    for folder in ("umed_plugin", "patches"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    imported.add(node.module.split(".")[0])
    declared = re.findall(r'^    "([A-Za-z0-9_-]+)[^"]*",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    allowed = {*map(normal, declared), *llava_brings(), "umed-plugin"}
    provider = metadata.packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - {"umed_plugin"}
    missing = {name for name in foreign if not {normal(owner) for owner in provider.get(name, [name])} & allowed}
    assert not missing - OPTIONAL, "add to pyproject.toml's dependencies, or to OPTIONAL with the reason"

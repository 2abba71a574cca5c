"""How readers find files: patterns, image folders, and the file that was probably meant by a name that is not there."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote

from umed_plugin.data.own_files import OwnFiles
from umed_plugin.data.places import folders_below, not_fetched
from umed_plugin.data.texts import read_json
from umed_plugin.faults import Faults

# Of images in general: letters first, so that the last component of a UID is not one.
_ENDING = re.compile(r"\.(?:nii\.gz|[A-Za-z][A-Za-z0-9]{0,4})$", re.IGNORECASE)
_WILDCARDS = "*?["
_NUMBERS = re.compile(r"\d+")
# Names of a folder that are compared with one that is missing. Comparing with 100,000 takes a second each.
_MOST_COMPARED = 5000


def without_ending(name: str) -> str:
    """``a.nii.gz`` -> ``a``; a name that ends in a number, such as a UID, has no ending."""
    return _ENDING.sub("", name) or name


def real_path(path: str, folders: dict[str, str]) -> str:
    """`os.path.realpath`, with each folder resolved once; ``folders`` remembers them between calls."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    place = os.path.join(folders[folder], name)
    return os.path.realpath(place) if os.path.islink(place) or name in ("", os.curdir, os.pardir) else place


class ImageFolders:
    """Where the images of a split are: the folders that match ``image_root``, searched in order.

    Each folder is listed once. Testing for each of 100,000 images in each of NIH's 12 folders takes minutes on a network disk.
    """

    def __init__(self, options: Any, root: Path, split: str, default: Path, faults: Optional[Faults] = None) -> None:
        self._listed: dict[str, set[str]] = {}
        self._faults = faults or Faults()
        self._by_stem: dict[str, dict[str, list[str]]] = {}
        patterns = options.image_roots(split)
        self.groups = [matching_folders(root, pattern) for pattern in patterns] or [[default]]
        self.folders = [folder for group in self.groups for folder in group]
        if patterns and not any(folder.is_dir() for folder in self.folders):
            self._faults.remark("annotations.image_root", f"there is no folder {' or '.join(map(str, self.folders))}")

    def find(self, names: Sequence[str]) -> Path:
        """The first file that exists under one of the names; if none does, the path at which the first name was tried.

        A name without ending stands for the one image that has it before its ending.
        """
        for name in names:
            below, file = os.path.split(name)
            for group in self.groups:
                found = [folder for folder in group if file in self._names_in(os.path.join(folder, below))]
                if len(found) > 1:
                    self._faults.add(
                        found[0] / name,
                        f"is in {found[1]} too, and nothing says which of the two is meant. Name the folder in the file's name",
                    )
                if found:
                    return found[0] / name
        return self._completed(names) or self.folders[0] / names[0]

    def _completed(self, names: Sequence[str]) -> Optional[Path]:
        for name in names:
            below, file = os.path.split(name)
            if file and without_ending(file) == file:
                for folder in self.folders:
                    listed = self._stems_in(os.path.join(folder, below)).get(file, [])
                    if len(listed) == 1:
                        return folder / below / listed[0]
        return None

    def images(self, endings: Iterable[str]) -> list[Path]:
        """All files with one of the endings (lower case), sorted; not those in sub folders."""
        return sorted(
            folder / name
            for folder in self.folders
            for name in self._names_in(os.path.join(folder, ""))
            if os.path.splitext(name)[1].lower() in endings
        )

    def _names_in(self, folder: str) -> set[str]:
        if folder not in self._listed:
            self._listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return self._listed[folder]

    def _stems_in(self, folder: str) -> dict[str, list[str]]:
        """Name without ending -> names of the folder that have one."""
        if folder not in self._by_stem:
            stems = self._by_stem.setdefault(folder, {})
            for name in self._names_in(folder):
                if without_ending(name) != name:
                    stems.setdefault(without_ending(name), []).append(name)
        return self._by_stem[folder]


class Renamed:
    """The names under which a file is looked for, by ``annotations.rename``; counts how many the rule changes."""

    def __init__(self, rule: Optional[tuple[str, str]]) -> None:
        self._rule = rule
        self._all: set[str] = set()
        self._changed: set[str] = set()

    def of(self, file: str) -> list[str]:
        """The renamed file, then the file as written."""
        if self._rule is None:
            return [file]
        self._all.add(file)
        if re.search(self._rule[0], file):
            self._changed.add(file)
        return [re.sub(*self._rule, file), file]

    def tell(self, path: Path, faults: Faults) -> None:
        """Remark on a rule that matches none or only some of the names."""
        if len(self._changed) < len(self._all):
            first = min(self._all - self._changed)
            faults.remark(
                path,
                f"annotations.rename matches {len(self._changed)} of {len(self._all)} names; not {first!r}, for example",
            )


def matching_folders(root: Path, pattern: str) -> list[Path]:
    """The folders that match; the pattern itself if none does, so that a message can name it."""
    if "*" not in pattern:
        return [root / pattern]
    own = OwnFiles(named_part(root, pattern))
    found = [path for path in matches(root, pattern) if path.is_dir()]
    meant = [path for path in found if own.run_of(path) is None and not own.is_run_alone(path)]
    return meant or found or [root / pattern]


def matches(root: Path, pattern: str) -> list[Path]:
    """What matches a pattern under the root, sorted. ``**`` stands for any number of folders, links to folders among them.

    An absolute pattern leaves the root. Names that begin with a dot match only a pattern that does.
    """
    start = Path(Path(pattern).anchor) if os.path.isabs(pattern) else root
    parts = [part for part in Path(pattern).parts if part != Path(pattern).anchor]
    found: Iterable[Path] = [start]
    for part in parts:
        found = [path for folder in found for path in _step(folder, part)]
    return sorted(set(found)) if parts else []


def named_part(root: Path, pattern: str) -> Path:
    """The folder that a pattern names before its first wildcard."""
    parts = itertools.takewhile(lambda part: not _has_wildcard(part), Path(pattern).parts)
    return root.joinpath(*parts)


def tell_own_files(own: OwnFiles, root: Path, faults: Faults) -> None:
    """Count what is left out because umed has written it."""
    for folder, count in own.left_out.items():
        faults.left_out["files", f"written by umed itself, in {os.path.relpath(folder, root)}"] += count


def _step(folder: Path, part: str) -> Iterator[Path]:
    if part == "**":
        yield from folders_below(folder)
    # A name such as `set [1]` stands for itself where it exists, and else for `set 1`.
    elif not _has_wildcard(part) or ("[" in part and os.path.lexists(folder / part)):
        if os.path.lexists(folder / part):
            yield folder / part
    elif folder.is_dir():
        for name in os.listdir(folder):
            if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                yield folder / name


def add_not_fetched(paths: Iterable[Path], faults: Faults) -> bool:
    """One fault for the links among the paths whose target is not there, which names the first; True if there are any."""
    said = [(path, text) for path in paths if (text := not_fetched(path)) is not None]
    if said:
        more = f". {len(said) - 1} more are such links" if len(said) > 1 else ""
        faults.add(said[0][0], said[0][1] + more)
    return bool(said)


def matching_files(root: Path, pattern: str, faults: Faults) -> list[Path]:
    """Files that match a pattern under the root, sorted. It is a fault if none does, and if one is a link that leads nowhere.

    Files that the pattern misses by their case or by a folder in between are counted: their images would be lost without a word.
    """
    own = OwnFiles(named_part(root, pattern))
    matching = own.without(matches(root, pattern))
    tell_own_files(own, root, faults)
    found = [path for path in matching if path.is_file()]
    if not add_not_fetched(matching, faults) and not found:
        but = f"; {matching[0].name} is a folder" if matching else ""
        but += f" but {own.count} that umed has written itself" if own.count else ""
        faults.add(root / pattern, f"no file matches{but}. Check annotations.files and the data root")
    folder, last = os.path.split(pattern)
    known = set(found)
    if _has_wildcard(last):
        nearby = set(own.without(matches(root, os.path.join(folder, "*")))) - known
        other_case = [path for path in nearby if _fits_but_for_case(path.name, last)]
        _tell_missed(root / pattern, other_case, "differ from it in case alone", faults)
    if _has_wildcard(pattern) and "**" not in pattern:
        below = os.path.join(folder, "**", last)
        _tell_missed(
            root / pattern,
            set(own.without(matches(root, below))) - known,
            f"are in sub folders. If no other pattern reads them, {below} does",
            faults,
        )
    return found


def _has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in _WILDCARDS)


def _fits_but_for_case(name: str, part: str) -> bool:
    return fnmatch.fnmatchcase(name.lower(), part.lower()) and not fnmatch.fnmatchcase(name, part)


def _tell_missed(where: Path, paths: Iterable[Path], why: str, faults: Faults) -> None:
    """A remark on the files among the paths. Folders are none, and links that lead nowhere are a fault of their own."""
    missed = sorted(path for path in paths if path.is_file())
    if missed:
        faults.remark(
            where, f"{len(missed)} further files do not fit the pattern, since they {why}. The first: {missed[0]}"
        )


def annotation_file(root: Path, name: str, faults: Faults) -> Optional[Path]:
    """The file of that name, or the one file that a pattern matches; None after a fault."""
    found = [root / name]
    if "*" in name:
        # A link that leads nowhere counts: the pattern would find another file once it is fetched.
        found = [path for path in matches(root, name) if path.is_file() or not_fetched(path)]
    if len(found) > 1:
        faults.add(root / name, f"matches {', '.join(path.name for path in found)}; needed: one. Name it in the recipe")
        return None
    if found and found[0].is_dir():
        faults.add(
            found[0],
            "is a folder; needed: the annotation file. Folders named by a class say what images show and not where: the reader "
            "folders reads them",
        )
        return None
    if not found or not found[0].is_file():
        path = found[0] if found else root / name
        faults.add(path, f"no such annotation file.{did_you_mean_file(path, root)}")
        return None
    return found[0]


def json_files(options: Any, root: Path, faults: Faults) -> Iterator[tuple[str, Path, Any]]:
    """(split, file, content) of each of a reader's files in JSON; one that is not there or cannot be read is a fault."""
    for split, name in options.files.items():
        path = annotation_file(root, name, faults)
        if path is not None:
            before = len(faults.messages)
            content = faults.read(read_json, path)
            if len(faults.messages) == before:
                yield split, path, content


def did_you_mean_file(path: Path, root: Path) -> str:
    """``" Did you mean 'x.png'?"`` for a file that is not there, what its link says if it is one, or ``""``.

    Names differ by Windows' backslash, by ``%20`` and its like, by case, by ending, by how accents are encoded, or by a typing
    mistake.
    """
    link = not_fetched(path)
    if link is not None:
        return f" It {link}."
    written = os.path.relpath(path, root)
    for variant in (written, written.replace("\\", "/"), unquote(written), unquote(written.replace("\\", "/"))):
        near = _nearest(root, variant)
        if near is not None and near != path:
            same = _composed(os.path.relpath(near, root)) == _composed(written)
            accents = " Both look the same, but encode an accent in two ways (Unicode NFC and NFD)." if same else ""
            return f" Did you mean {os.path.relpath(near, root)!r}?{accents}"
    return ""


def _nearest(root: Path, written: str) -> Optional[Path]:
    """The path as written, apart from case, and from ending or spelling of its last part; None if there is none."""
    current = root
    *folders, last = Path(written).parts or ("",)
    for part in folders:
        names = _listing(str(current))
        alike = [part] if part in names or part == ".." else _alike(names, part)
        if not alike:
            return None
        current = current / alike[0]
    names = _listing(str(current))
    if last in names:
        return current / last
    stem = _folded(without_ending(last))
    near = _alike(names, last)
    near += [name for name in names if _folded(without_ending(name)) == stem]
    if not near and len(names) <= _MOST_COMPARED:
        # Another number is another image, however close the names are.
        same_numbers = [name for name in names if _NUMBERS.findall(name) == _NUMBERS.findall(last)]
        near = difflib.get_close_matches(last, same_numbers, n=1, cutoff=0.8)
    return current / near[0] if near else None


def _alike(names: Iterable[str], written: str) -> list[str]:
    wanted = _folded(written)
    return [name for name in names if _folded(name) == wanted]


def _composed(name: str) -> str:
    """A name whose accents are part of their letters (NFC). macOS and its archives write them apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).lower()


def _listing(folder: str) -> tuple[str, ...]:
    return tuple(sorted(os.listdir(folder))) if os.path.isdir(folder) else ()

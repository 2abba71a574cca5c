"""The page docs/python-api.md, made from what `umed_plugin` exports: signature, first paragraph and example of each name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import umed_plugin

HEAD = """# Python API

`import umed_plugin` gives the names on this page. Each is imported on first use, so the import itself needs only the standard
library. Everything else in the package is private and may change in any release.

```python
import umed_plugin
```
"""


def python_api() -> str:
    """The whole page as Markdown."""
    names = [*umed_plugin._MODULES, "__version__"]  # in the order of the work; __all__ is sorted by the alphabet
    assert set(names) == set(umed_plugin.__all__)
    return "\n".join([HEAD, *(_member(name, getattr(umed_plugin, name)) for name in names)])


def _member(name: str, member: Any) -> str:
    if not callable(member):
        return f"## `{name}`\n\nVersion of the installed package, a string such as `{member}`.\n"
    doc = inspect.getdoc(member) or ""
    summary = re.sub(r"``([^`]+)``|:\w+:`~?([^`]+)`", lambda found: f"`{found[1] or found[2]}`", doc.split("\n\n")[0])
    parts = [f"## `{name}`\n", f"```python\n{_signature(name, member)}\n```\n", f"{summary}\n"]
    example = re.search(r"^Examples?:\n((?:(?: {4}.*)?\n?)+)", doc, re.MULTILINE)
    if example:
        prose, mark, code = inspect.cleandoc(example[1]).partition(">>> ")
        parts.append(f"{prose.strip()}\n" if prose.strip() else "")
        parts.append(f"```python\n{mark}{code}\n```\n")
    return "\n".join(filter(None, parts))


def _signature(name: str, member: Any) -> str:
    """``name(argument: type = default, ...) -> type``, one argument a line where it is long."""
    if inspect.isclass(member) and issubclass(member, BaseException):
        return f"class {name}({', '.join(base.__name__ for base in member.__bases__)})"
    signature = inspect.signature(member)
    arguments = [str(argument) for argument in signature.parameters.values()]
    arguments = [re.sub(r"<function (\w+) at \w+>", r"\1", re.sub(r": '([^']*)'", r": \1", text)) for text in arguments]
    marks = [argument.kind for argument in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in marks and inspect.Parameter.VAR_POSITIONAL not in marks:
        arguments.insert(marks.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = signature.return_annotation
    arrow = "" if returned is inspect.Signature.empty or inspect.isclass(member) else f" -> {returned}"
    line = f"{name}({', '.join(arguments)}){arrow}"
    if len(line) <= 100:
        return line
    return "{}(\n{}){}".format(name, "".join(f"    {argument},\n" for argument in arguments), arrow)

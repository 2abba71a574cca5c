"""umed-plugin: upgrade a LLaVA-Med-style checkpoint to UMed-LVLM (arXiv 2501.01377) inside an existing LLaVA environment.

This module is imported by every Python process under ``umed-run``: it imports nothing but the standard library.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `patches/` and `data_recipes/` lie beside this package; in a wheel they lie inside it.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "patches").is_dir() and (_checkout / "patches" / "__init__.py").is_file():
    __path__.append(str(_checkout))

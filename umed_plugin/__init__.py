"""umed-plugin: upgrade a LLaVA-Med-style checkpoint to UMed-LVLM (arXiv 2501.01377) inside an existing LLaVA environment.

This module is imported by every Python process under ``umed-run``: it imports nothing but the standard library.
"""

__version__ = "0.1.0"

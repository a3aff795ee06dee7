"""These tests need the extra `parity`: PyTorch, transformers, diffusers."""

import importlib.util

_NEEDED = ("torch", "transformers", "tokenizers", "tiktoken", "bs4", "ftfy",
           "diffusers")
_MISSING = [name for name in _NEEDED if not importlib.util.find_spec(name)]
collect_ignore_glob = ["test_*.py"] if _MISSING else []


def pytest_terminal_summary(terminalreporter):
  if _MISSING:
    terminalreporter.write_line(
        f"tests/parity left out, no {', '.join(_MISSING)}: "
        "pip install -e '.[parity]' runs it", yellow=True)

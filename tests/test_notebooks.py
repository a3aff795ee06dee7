"""The notebooks run from top to bottom, and carry no outputs."""

import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*"))


def cells(path):
  return json.loads(path.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stripped_and_explained(path):
  """No outputs, no counts; what is to be seen is said after most code."""
  code = [c for c in cells(path) if c["cell_type"] == "code"]
  assert all(not c["outputs"] and c["execution_count"] is None for c in code)
  text = "".join("".join(c["source"]) for c in cells(path))
  assert text.count("What you should see") >= len(code) // 2
  for line in (x for c in code for x in c["source"]):
    assert len(line.rstrip()) <= 82, line


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  """Every cell runs on a CPU with small settings, in a kernel of its own."""
  import nbclient
  import nbformat

  monkeypatch.setenv("SSD_JAX_SMALL", "1")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  root = str(pathlib.Path(__file__).parent.parent)
  monkeypatch.setenv("PYTHONPATH", root)
  notebook = nbformat.read(path, 4)
  client = nbclient.NotebookClient(
      notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
  client.execute()
  outputs = [o for c in notebook.cells if c.cell_type == "code"
             for o in c.outputs]
  said = "".join(o.get("text", "") for o in outputs)
  assert re.search(r"Running on", said) and "Traceback" not in said
  if path.stem != "your_model":
    assert any("image/png" in o.get("data", {}) for o in outputs)

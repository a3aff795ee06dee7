"""The notebooks run from top to bottom, and keep only images that teach."""

import base64
import io
import json
import re

from PIL import Image
import pytest

from tests.support import ROOT

FOLDER = ROOT / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path):
  return json.loads(path.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_explained(path):
  """What is to be seen is said after most code, whose lines are short."""
  code = [c for c in cells(path) if c["cell_type"] == "code"]
  text = "".join("".join(c["source"]) for c in cells(path))
  assert text.count("What you should see") >= len(code) // 2
  for line in (x for c in code for x in c["source"]):
    assert len(line.rstrip()) <= 82, line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_pictures_that_teach_are_stored(path):
  """A token that is tagged keeps one small image; no text, no counts."""
  text = path.read_text("utf-8")
  for cell in (c for c in cells(path) if c["cell_type"] == "code"):
    assert cell["execution_count"] is None
    is_kept = "keep_output" in cell["metadata"].get("tags", [])
    assert len(cell["outputs"]) == is_kept
    for output in cell["outputs"]:
      [(kind, data)] = output["data"].items()
      assert output["output_type"] == "display_data" and not output["metadata"]
      picture = Image.open(io.BytesIO(base64.b64decode(data)))
      assert kind == f"image/{picture.format.lower()}"
  assert len(text) < 300_000
  # As the hook of .pre-commit-config.yaml would leave it.
  ids = [cell["id"] for cell in cells(path)]
  assert ids == [str(number) for number in range(len(ids))]
  assert text == json.dumps(
      json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_quickstart_shows_what_it_is_about():
  """Before it is run: images, an animation, and the order of commits."""
  quickstart = cells(FOLDER / "quickstart.ipynb")
  kinds = [kind for c in quickstart for o in c.get("outputs", ())
           for kind in o["data"]]
  assert kinds == ["image/png", "image/gif", "image/png"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  """Every token runs on a CPU with small settings, in a kernel of its own."""
  import nbclient
  import nbformat

  monkeypatch.setenv("SSD_JAX_SMALL", "1")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  root = str(ROOT)
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

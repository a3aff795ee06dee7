"""Writes families.npz: what PyTorch computes of the toy families.

    python -m tests.golden.make_families

Needs the extra `parity`. Weights are not stored: their names determine them.
"""

import pathlib
import tempfile

import numpy as np
import torch

from tests.parity import glm_image
from tests.parity.references import FAMILIES, TEXTS
from tests.support.toy_weights import CODES


def main() -> None:
  """Computes and writes every array."""
  arrays = {}
  for name, family in FAMILIES.items():
    torch.manual_seed(0)
    reference = family()
    with tempfile.TemporaryDirectory() as folder:
      reference.save(pathlib.Path(folder))
      values = compute(name, reference)
    arrays |= {f"{name}/{key}": value for key, value in values.items()}
  arrays |= of_glm_image()
  file = pathlib.Path(__file__).parent / "families.npz"
  np.savez_compressed(file, **arrays)
  print(file, file.stat().st_size, "bytes")


def compute(name: str, reference) -> dict[str, np.ndarray]:
  """Prompts, logits, pixels and codes of a family."""
  rng = np.random.default_rng(0)
  tokens = np.array(
      reference.sequence(rng.integers(0, CODES, reference.length)))
  text = "3" if name == "llamagen_class" else TEXTS[0]
  pixels = reference.decode(torch.tensor(rng.integers(
      0, CODES, (1, reference.rows, reference.cols))))
  values = {"tokens": tokens, "pixels": pixels.numpy(),
            "codes": reference.encode(torch.tanh(pixels)).numpy()}
  for stream, conditional in (("cond", True), ("uncond", False)):
    values[stream] = np.array(reference.prompt(text, conditional))
    values[f"{stream}_logits"] = reference.logits(
        text, conditional, list(tokens[:-1]))
  if name == "llamagen_text":
    ids = torch.tensor(values["cond"])[None]
    values["features"] = reference.t5(ids).last_hidden_state.numpy()
  return values


def of_glm_image() -> dict[str, np.ndarray]:
  """Prompt, tokens of preview and image, and logits of GLM-Image."""
  reference = glm_image.Reference()
  with tempfile.TemporaryDirectory() as folder:
    reference.save(pathlib.Path(folder))
    prompt = reference.prompt(TEXTS[0])
  tokens = np.random.default_rng(0).integers(0, CODES, 8)
  logits = reference.logits(prompt, tokens[:-1].tolist())
  return {"glm_image/prompt": np.array(prompt), "glm_image/tokens": tokens,
          "glm_image/logits": logits}


if __name__ == "__main__":
  main()

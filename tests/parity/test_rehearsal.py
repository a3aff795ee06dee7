"""docs/scale.md in small: the commands of a pod, on a made-up checkpoint."""

import numpy as np
from PIL import Image
import pytest

from tests.support import rehearsal


@pytest.mark.slow
def test_the_pages_commands_lead_from_a_checkpoint_to_images(tmp_path):
  """Converted, with an image for each prompt and heads that draft for ssd. The
  drafter and the other decoders: python -m tests.support.rehearsal."""
  size = rehearsal.Size(side=8, images=12, trunk_steps=2, steps=2)
  folder = tmp_path / "run"
  rehearsal.rehearse(folder, size, 1, kills=0, last=1, leave_out=(
      "train.drafter", "--drafter", "stair"))
  tokens, heads = rehearsal.outcome(folder)
  assert sorted(tokens) == [
      *(("train", i) for i in range(11)), ("validation", 0)]
  assert all(row.shape == (64,) for row in tokens.values())
  assert all(np.isfinite(x).all() for x in rehearsal.leaves(heads))
  found = sorted((folder / "out" / "ssd").glob("000*.png"))
  assert len(found) == 2
  assert Image.open(found[0]).size == (128, 128)

"""CASCADE's premise measured: which states are compared, which tokens."""

import numpy as np
import pytest

from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import redundancy
from ssd_jax.pipeline import testing


def test_offsets_pair_the_right_cells():
  """Cosines separate equal tokens from different ones; states mark columns."""
  tokens = np.array([[[0, 1, 0], [1, 0, 1]]])
  states = np.eye(3)[tokens]
  equal, different = redundancy.by_offset(states, tokens, 2)
  assert equal.shape == different.shape == (3, 5)
  assert np.isnan(equal[2]).all() and np.isnan(different[0, 2])
  assert equal[0, 2] == 1 and equal[0, 4] == equal[0, 0] == 1
  assert np.isnan(equal[0, 3]) and different[0, 3] == 0
  assert equal[1, 3] == equal[1, 1] == 1 and different[1, 2] == 0


@pytest.mark.slow
def test_states_are_those_of_the_uncached_forward():
  """Alternatives see what a generated token would; the generated one is its
  own."""
  pipe = testing.tiny(
      3, 2, 3, end_of_row=True, heads=(0, 0), guidance=2.0)
  drawn = pipe.generate(["ab", "c"], AR(), batch=2).tokens
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["ab", "c"], guided)
  sequence = pipe.sequence(drawn)
  states, siblings, parents = map(np.asarray, redundancy.make_look(pipe.model)(
      pipe.params, prompt, sequence, settings))
  hidden = np.asarray(pipe.family.generator.hidden(
      pipe.params, prompt, np.concatenate([sequence] * 2)))[:2, 1:]
  hidden = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
  np.testing.assert_allclose(states[:, :-1], hidden, atol=1e-4)
  assert siblings.shape == (2, 5, 3, 3) and parents.shape == (2, 5, 3)
  np.testing.assert_allclose(
      np.diagonal(siblings, axis1=-2, axis2=-1), 1.0, atol=1e-5)
  # One of all three codes is the drawn one: its cosine with the slot before.
  cells = [1, 2, 4, 5, 6]
  before = np.array(cells) - 1
  own = np.einsum("bnd,bnd->bn", states[:, cells], states[:, before])
  nearest = np.abs(parents - own[..., None]).min(-1)
  np.testing.assert_allclose(nearest, 0, atol=1e-4)
  found = redundancy.collect(pipe, drawn, ["ab", "c"], batch=2)
  assert found.entropy_RC.shape == (2, 3) and found.entropies.shape == (12,)
  assert found.slots_MM.shape == (7, 7)
  assert (np.diff(found.alike_T) <= 0).all()

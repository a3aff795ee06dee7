"""The checksum of a training state depends on every bit."""

import jax.numpy as jnp
import numpy as np

from ssd_jax.training.state import checksum_tree


def test_a_sum_tells_every_bit():
  """Another one for each bit of each kind of number, whatever its place."""
  kinds = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, bool]
  leaves = [jnp.ones((3, 5), kind) for kind in kinds]
  before = [int(x) for x in checksum_tree(leaves)]
  for at, leaf in enumerate(leaves):
    flat = np.array(leaf).view(np.uint8).reshape(-1)
    for place in (0, flat.size // 2, flat.size - 1):
      other = flat.copy()
      other[place] ^= 1
      other = jnp.asarray(other.view(leaf.dtype).reshape(leaf.shape))
      assert int(checksum_tree([other])[0]) != before[at]
  swapped = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
  assert len({int(x) for x in checksum_tree(swapped)}) == 2

"""Training the trunk: codes cached per image, small splits."""

import numpy as np

from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.training import ar


def test_codes_of_other_images_are_not_reused(
    tmp_path, monkeypatch, capsys):
  """Kept codes belong to their images and tokenizer; others are made anew,
  and so are damaged ones."""
  monkeypatch.setattr(
      ar, "reconstruct",
      lambda vq, params, images, on_batch: (None, images[..., 0]))

  class Source(list):
    def variants(self, index):
      image = np.full((2, 2, 3), self[index], np.uint8)
      return [{"caption": str(self[index]), "tags": (), "image": image}]

  encode = lambda pictures, params: ar.encode_split(
      None, params, Source(pictures), tmp_path / "train_tokens.npy")
  for pictures in ([1, 2], [0, 1, 2], [1, 2]):
    codes = encode(pictures, {"w": np.zeros(1)})
    assert codes.tokens[:, 0].tolist() == pictures
  assert len(list(tmp_path.iterdir())) == 2
  encode([1, 2], {"w": np.ones(1)})
  assert len(list(tmp_path.iterdir())) == 3
  capsys.readouterr()
  for path in tmp_path.iterdir():
    whole = path.read_bytes()
    flipped = whole.replace(b"\x01\x01", b"\x01\x03", 1)
    for damaged in (b"", whole[:len(whole) // 2], flipped):
      path.write_bytes(damaged)
      encode([1, 2], {"w": np.ones(1)})
      encode([0, 1, 2], {"w": np.zeros(1)})
      codes = encode([1, 2], {"w": np.zeros(1)})
      assert codes.tokens[:, 0].tolist() == [1, 2]
      assert path.read_bytes() == whole and flipped != whole
      assert capsys.readouterr().err.count("encoding it again\n") == 1


def test_few_held_out_pictures_are_a_batch():
  """A split smaller than a batch is measured all the same."""
  words = Vocabulary.build(["a", "b"], 6)
  few = ar.TokenSource(
      np.zeros((2, 4), np.int32), ("a", "b"), ((), ()), ((0,), (1,)))
  (batch,) = ar.plain_batches(few, words, 8, 64)
  assert batch["tokens"].shape == (2, 4)

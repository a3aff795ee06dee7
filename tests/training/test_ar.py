"""Training the trunk: codes cached per image, small splits."""

import itertools
import tracemalloc

import numpy as np
import pytest

from ssd_jax.data import survey
from ssd_jax.data.pictures import Source
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.models.vq import VQ, VQConfig
from ssd_jax.training import ar


class Numbers(Source):
  """Pictures of one value each."""

  def __init__(self, values, side=2):
    self.keys, self.values = tuple(map(str, values)), values
    self.side = side

  def __getitem__(self, index):
    image = np.full((self.side, self.side, 3), self.values[index], np.uint8)
    return {"caption": self.keys[index], "tags": (), "image": image}


@pytest.fixture
def encode_numbers(tmp_path, monkeypatch):
  """Encodes pictures of these values, with a tokenizer of this weight."""
  def encode(vq, params, images):
    while part := list(itertools.islice(images, 3)):
      yield np.stack(part)[:, :2, :2, 0]

  monkeypatch.setattr(ar, "encode", encode)
  vq = VQ(VQConfig(n_codes=256))
  return lambda values, weight=0, side=2: ar.encode_split(
      vq, {"w": np.full(1, weight)}, survey.survey(Numbers(values, side)),
      tmp_path / "train_tokens.npy")


def test_codes_of_other_images_are_not_reused(
    tmp_path, capsys, encode_numbers):
  """Kept codes belong to their images and tokenizer; others are made anew,
  and so are damaged ones."""
  for pictures in ([1, 2], [0, 1, 2, 3], [1, 2]):
    codes = encode_numbers(pictures)
    assert codes.sequences(range(len(codes)))[:, 0].tolist() == pictures
  assert len(list(tmp_path.iterdir())) == 2
  encode_numbers([1, 2], 1)
  assert len(list(tmp_path.iterdir())) == 3
  capsys.readouterr()
  files = list(tmp_path.iterdir())
  for path, other in zip(files, files[1:] + files[:1]):
    whole = path.read_bytes()
    flipped = whole.replace(b"\x01\x01", b"\x01\x03", 1)
    for damaged in (b"", whole[:len(whole) // 2], flipped, other.read_bytes()):
      path.write_bytes(damaged)
      encode_numbers([1, 2], 1)
      encode_numbers([0, 1, 2, 3])
      codes = encode_numbers([1, 2])
      assert codes.tokens[:, 0].tolist() == [1, 2]
      assert path.read_bytes() == whole and flipped != whole
      assert capsys.readouterr().err.count("encoding it again\n") == 1


def test_codes_alone_are_kept(encode_numbers):
  """A thousand pictures of 12 kB are never held together, their codes are."""
  tracemalloc.start()
  try:
    codes = encode_numbers(list(range(256)) * 4, side=64)
    most = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert most < 3e6  # all of them: 12.6 MB
  assert codes.tokens.dtype == np.uint8 and codes.tokens.shape == (1024, 4)
  assert codes.sequences([7]).tolist() == [[7] * 4]
  assert codes.sequences([7]).dtype == np.int32


def test_few_held_out_pictures_are_a_batch():
  """A split smaller than a batch is measured all the same."""
  words = Vocabulary.build(["a", "b"], 6)
  few = ar.TokenSource(
      np.zeros((2, 4), np.int32), ("a", "b"), ((), ()), ((0,), (1,)))
  (batch,) = ar.plain_batches(few, words, 8, 64)
  assert batch["tokens"].shape == (2, 4)

"""What a user holds: progress pass by pass, saving, decoders by name."""

from collections.abc import Iterator

import numpy as np
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.pipeline import testing


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4)


@pytest.mark.slow
def test_on_pass_is_called_for_every_pass(pipe):
  """A listener sees each pass once, and the last grid is what is returned."""
  said = []
  out = pipe.generate(["a", "b", "c"], batch=2, on_pass=said.append)
  assert [p.passes for p in said] == 2 * list(range(1, 13))
  assert [len(p.index) for p in said] == 12 * [2] + 12 * [1]
  assert [p.is_final.sum() for p in said[:12]] == list(range(2, 26, 2))
  np.testing.assert_array_equal(said[11].tokens, out.tokens[:2])
  np.testing.assert_array_equal(said[-1].tokens[0], out.tokens[2])
  assert said[0].fraction == pytest.approx(1 / 12) and said[-1].fraction == 1


def test_another_listener_compiles_nothing_and_silence_is_free(pipe):
  """Listeners share a program; a call without one runs another, as before."""
  first, second = [], []
  pipe.generate(["a"], on_pass=first.append)
  programs = len(pipe.programs)
  listened = pipe.generate(["a"], on_pass=second.append)
  assert len(pipe.programs) == programs and len(first) == len(second) == 12
  silent = pipe.generate(["a"])
  np.testing.assert_array_equal(silent.tokens, listened.tokens)
  assert len(first) == len(second) == 12


@pytest.mark.slow
def test_decoders_by_name_and_pictures_by_index(pipe):
  """A text names a decoder; a list of indices picks the images of a call."""
  named = pipe.generate(["a"] * 4, "sjd:window=3")
  made = pipe.generate(["a"] * 4, ssd_jax.SJD(window=3), batch=4)
  np.testing.assert_array_equal(named.tokens, made.tokens)
  picked = pipe.generate(["a"] * 3, "sjd:window=3", first_image=[3, 0, 2],
                         batch=2)
  np.testing.assert_array_equal(picked.tokens, made.tokens[[3, 0, 2]])
  with pytest.raises(UserError, match="first_image"):
    pipe.generate(["a"] * 3, first_image=[1, 2])


class Changing(ssd_jax.SJD):
  """A decoder that cannot be hashed, as those whose settings may change."""

  __hash__ = None


MISTAKES = [
  (dict(prompts=3), "Expected prompts to be a list.*, got prompts=3"),
  (dict(prompts="red heart"), "Put it in a list"),
  (dict(prompts=[None]), "Expected a text.*, got the prompt None"),
  (dict(prompts=[["a"]]), "Expected a text.* the prompt"),
  (dict(prompts=(x for x in ())),
   "Expected prompts to be at least one.*, got prompts=none"),
  (dict(decoder="nope"), "Expected one of .*'ar'"),
  (dict(decoder="stare"), "Did you mean 'stair'"),
  (dict(decoder=ssd_jax.Stair), r"Write Stair\(\)"),
  (dict(decoder=None), r"got None as decoder, without a start\(\)"),
  (dict(decoder=Changing()), "frozen=True"),
  (dict(num_images=0), "Expected num_images to be >= 1.*, got num_images=0"),
  (dict(num_images=1.5),
   "Expected num_images to be a whole number.*, got num_images=1.5"),
  (dict(num_images=2**40), "at most .*num_images="),
  (dict(batch=0), "Expected batch to be >= 1.*, got batch=0"),
  (dict(batch=None), "Expected batch to be a whole number.*, got batch=None"),
  (dict(seed=-1), "Expected seed to be in.*, got seed=-1"),
  (dict(seed="x"), "Expected seed to be a whole number.*, got seed='x'"),
  (dict(guidance="x"), "Expected guidance to be a number.*, got guidance='x'"),
  (dict(guidance=float("nan")),
   "Expected guidance to be a number.*, got guidance=nan"),
  (dict(top_k=2.5), "Expected top_k to be a whole number.*, got top_k=2.5"),
  (dict(first_image=-1),
   "Expected first_image to be indices.*, got first_image=-1"),
  (dict(first_image=0.5),
   "Expected first_image to be whole numbers.*, got first_image=0.5"),
  (dict(on_pass=3), "Expected on_pass to be a function.*, got on_pass=3"),
]


@pytest.mark.parametrize(
    "given,said", MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_in_python_are_one_line(pipe, given, said):
  """Of the wrong type or out of range: one line, before any work."""
  call = {"prompts": ["a"]} | given
  with pytest.raises(UserError, match=said) as error:
    pipe.generate(**call)
  assert "\n" not in str(error.value)
  if "on_pass" not in call and not isinstance(call["prompts"], Iterator):
    with pytest.raises(UserError, match=said):
      list(pipe.stream(**call))


def test_grids_of_another_model_are_refused(pipe):
  """Another shape or code, or prompts that are too few, give no figures."""
  one = np.zeros((1, 3, 4), int)
  for wrong in (one[0], one[:, :2], one + 0.5, one + 5, one - 1):
    with pytest.raises(UserError, match="Expected .* got tokens"):
      pipe.decode_images(wrong)
    with pytest.raises(UserError, match="Expected .* got tokens"):
      pipe.log_prob(wrong, ["a"])
  for prompts in ([], "a", ["a", "b"]):
    with pytest.raises(UserError, match="one per grid"):
      pipe.nll(one, prompts)


def test_a_prompt_may_be_the_number_of_a_class(pipe):
  """A number is its text, from numpy too."""
  out = pipe.generate([7, np.int64(8)], num_images=np.int32(1))
  assert out.prompts == ("7", "8")
  assert [p.prompt for p in pipe.stream([7])] == ["7"]


def test_parameters_are_immutable(pipe):
  """A pipeline cannot multiply with other weights than those it reports."""
  with pytest.raises((TypeError, ValueError), match="immutable"):
    pipe.params["trunk"]["embedding"] = pipe.params["trunk"]["embedding"]
  with pytest.raises((TypeError, ValueError), match="immutable"):
    pipe.params["heads"] = {}


def test_with_params_changes_what_is_generated_and_scored(pipe):
  """Other weights reach `generate` and `nll` alike, even after a first call."""
  before = pipe.generate(["a"], seed=3)
  trunk = pipe.params["trunk"]
  other = pipe.with_params(trunk={**trunk, "head": -trunk["head"]})
  after = other.generate(["a"], seed=3)
  assert not np.array_equal(before.tokens, after.tokens)
  assert not np.allclose(
      pipe.nll(before.tokens, ["a"])[0], other.nll(before.tokens, ["a"])[0])
  np.testing.assert_array_equal(
      pipe.generate(["a"], seed=3).tokens, before.tokens)


def test_pictures_keep_the_index_of_the_whole_call(pipe):
  """An image's index keys its noise, also in a call that starts later."""
  whole = pipe.generate(["a", "b", "c"], seed=5)
  part = pipe.generate(["b", "c"], seed=5, first_image=1)
  assert [p.index for p in part.pictures] == [1, 2]
  for picture in part.pictures:
    np.testing.assert_array_equal(picture.tokens, whole.tokens[picture.index])


@pytest.mark.parametrize("parts,said", [
    (dict(wings={}), "Expected a part of .*'wings'"),
    (dict(heads={}), "Expected heads/.* got shape none")])
def test_parts_that_do_not_fit_are_one_line(pipe, parts, said):
  """Parameters of another model are refused before anything multiplies them."""
  with pytest.raises(UserError, match=said):
    pipe.with_params(**parts)

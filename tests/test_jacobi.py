"""SJD and its successors: their law, their counts, what they reduce to."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from testkit import tiny

from ssd_jax import sampling as sampling_lib, testing
from ssd_jax.config import UserError
from ssd_jax.decoding import engine, first_drafts
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi import SJD, Continuation, Coupled
from ssd_jax.grid import Grid
from ssd_jax.sampling import Sampling

DRAWS = 20_000
PLAIN = (("guidance", 1.0),)
FILTERED = (("guidance", 2.0), ("top_k", 2))


def pipeline(end_of_row, rows=2, cols=3, vocab=3):
  """A trunk without heads, made once per grid."""
  return tiny(rows, cols, vocab, end_of_row, heads=(0, 0))


def prompt_of(pipe, rows, settings):
  """A prompt of `rows` images, guided where the settings say so."""
  guided = dict(settings)["guidance"] != 1.0
  return pipe.family.encode_prompts(["a"] * rows, guided)[0]


@functools.cache
def law(pipe, settings):
  """float64 [images]: the probability of every image of the grid."""
  images, generator = testing.every_image(pipe), pipe.family.generator
  prompt = prompt_of(pipe, len(images), settings)
  streams = prompt.tokens.shape[0] // len(images)
  sequence_SN = jnp.concatenate([pipe.sequence(images)] * streams)
  hidden = jax.jit(generator.hidden)(pipe.params, prompt, sequence_SN)
  logits = generator.logits(pipe.params, hidden)
  p = sampling_lib.target(
      logits.reshape(streams, -1, *logits.shape[1:]),
      Sampling.make(**dict(settings)))
  p = np.asarray(p, np.float64)[:, pipe.model.grid.slot_of.ravel()]
  taken = images.reshape(len(images), -1, 1)
  return np.take_along_axis(p, taken, -1)[..., 0].prod(-1)


@functools.cache
def draw(pipe, decoder, count, batch=None, settings=PLAIN):
  """(tokens [count, R, C], passes, commit passes), in batches of `batch`."""
  batch = batch or count

  def arguments(image_B):
    return (pipe.params, prompt_of(pipe, batch, settings),
            Sampling.make(**dict(settings)), jax.random.key(5), image_B)

  images = jnp.arange(count).reshape(-1, batch)
  # Compiling is what these tests spend their time on.
  run = engine.decode.lower(
      pipe.model, decoder, *arguments(images[0])
  ).compile(compiler_options={"xla_backend_optimization_level": 0})
  outs = [run(*arguments(image_B)) for image_B in images]
  return [np.concatenate([getattr(out, name) for out in outs])
          for name in ("tokens", "passes", "commit_pass")]


def p_value(pipe, tokens, settings):
  """Chi-square of drawn images against their exact law."""
  expected = law(pipe, settings) * len(tokens)
  cells = tokens.reshape(len(tokens), -1)
  code = cells @ pipe.model.vocab ** np.arange(cells.shape[1])[::-1]
  counts = np.bincount(code, minlength=len(expected))
  assert counts[expected == 0].sum() == 0
  rare = expected < 5
  counts, expected = (
      np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
  if expected[-1] < 5:
    counts[-2] += counts[-1]
    expected[-2] += expected[-1]
    counts, expected = counts[:-1], expected[:-1]
  return stats.chisquare(counts, expected / expected.sum() * len(tokens)).pvalue


def assert_lossless(decoder, end_of_row, settings):
  """Every image there is comes as often as AR draws it (chi-square)."""
  pipe = pipeline(end_of_row)
  tokens, passes, _ = draw(pipe, decoder, DRAWS, None, settings)
  p = p_value(pipe, tokens, settings)
  print(decoder, end_of_row, settings, "p", p, "passes", passes.mean())
  assert decoder.lossless
  assert p > 1e-3


@pytest.mark.parametrize("decoder, end_of_row, settings", [
    (SJD(4), False, PLAIN),
    (Coupled(4, "repeat_above"), True, PLAIN),
    (Continuation(4, "sample_above"), True, FILTERED),
], ids=str)
def test_lossless(decoder, end_of_row, settings):
  """The law of whole images is AR's."""
  assert_lossless(decoder, end_of_row, settings)


@pytest.mark.slow
@pytest.mark.parametrize("end_of_row", [False, True])
@pytest.mark.parametrize("settings", [PLAIN, FILTERED])
@pytest.mark.parametrize("decoder", [
    *(SJD(4, init) for init in first_drafts.INITS),
    SJD(2, tail="reference"),
    SJD(7),
    SJD(4, "repeat_left", acceptance="equality"),
    *(Coupled(4, init) for init in first_drafts.INITS),
    Coupled(4, coupling="maximal"),
    *(Continuation(4, init) for init in first_drafts.INITS),
    Continuation(2, "sample_above", tail="reference"),
], ids=str)
def test_lossless_everywhere(decoder, end_of_row, settings):
  """Every initialisation, coupling and tail keeps AR's law."""
  assert_lossless(decoder, end_of_row, settings)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("decoder", [SJD(4), Coupled(4), Continuation(4)])
def test_lossless_in_small_batches(decoder, batch):
  """Drawn one by one or four at a time, the law of images is AR's."""
  pipe = pipeline(True)
  tokens, _, _ = draw(pipe, decoder, DRAWS, batch, FILTERED)
  assert p_value(pipe, tokens, FILTERED) > 1e-3


def test_batch_does_not_matter():
  """Each image goes at its own speed: batches of 1 and 4 give the same."""
  pipe, decoder = pipeline(True, 3, 3, 5), Coupled(4, "sample_above")
  alone = draw(pipe, decoder, 32, 1, FILTERED)
  together = draw(pipe, decoder, 32, 4, FILTERED)
  assert len(set(alone[1])) > 1
  for one, four in zip(alone, together, strict=True):
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize("decoder, end_of_row", [
    (SJD(1), True),
    (SJD(4, "repeat_above", acceptance="equality"), True),
    pytest.param(Coupled(1), False, marks=pytest.mark.slow),
    pytest.param(SJD(16, acceptance="equality"), False, marks=pytest.mark.slow),
], ids=str)
def test_equals_ar(decoder, end_of_row):
  """A window of one, and equality Jacobi, give AR's tokens cell by cell."""
  pipe = pipeline(end_of_row, 3, 3, 5)
  expected, cells, _ = draw(pipe, AR(), 32, None, FILTERED)
  tokens, passes, _ = draw(pipe, decoder, 32, None, FILTERED)
  np.testing.assert_array_equal(tokens, expected)
  assert (passes <= cells).all()


@pytest.mark.slow
def test_continuation_is_maximal_coupling():
  """The rules of two publications are one algorithm, token for token."""
  pipe = pipeline(True, 4, 4, 5)
  ours = draw(pipe, Continuation(5), 32)
  theirs = draw(pipe, Coupled(5, coupling="maximal"), 32)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_reference_tail_goes_one_by_one():
  """The published tail gives each of the last W + 2 slots its own pass."""
  pipe, window = pipeline(True, 4, 4, 5), 3
  _, _, commit = draw(pipe, SJD(window, tail="reference"), 32)
  grid = pipe.model.grid
  in_tail = grid.slot_of.ravel() >= grid.length - window - 2
  commit = commit.reshape(32, -1)
  assert (np.diff(commit[:, in_tail], axis=1) == 1).all()
  assert (np.diff(commit[:, ~in_tail], axis=1) == 0).any()


def test_passes_are_bounded():
  """A pass ends at least one cell and at most W; forced slots cost none."""
  pipe = pipeline(True, 4, 4, 5)
  tokens, passes, commit = draw(pipe, Continuation(5), 32)
  assert tokens.min() >= 0 and tokens.max() < 5
  assert (np.diff(commit.reshape(32, -1), axis=1) <= 1).all()
  assert (passes == commit.max((1, 2))).all()
  assert passes.mean() < 16 and (passes >= 1 + 15 / 5).all()


def first(init, last, slots, end_of_row=True):
  """(drafts, tokens) of fresh slots on a 3 x 3 grid of 50 codes."""
  model = types.SimpleNamespace(grid=Grid(3, 3, end_of_row), vocab=50)
  sampling = Sampling.make()
  ctx = engine.Context(
      jax.random.key(0), jnp.int32(0), jnp.int32(4), {}, sampling, model)
  tokens_N = 10 + jnp.arange(model.grid.length)
  q_QV = jax.nn.one_hot(20 + jnp.array(slots), 50)
  return first_drafts.draft_first(
      ctx, init, jnp.array(slots), jnp.int32(last), tokens_N, q_QV)


@pytest.mark.parametrize("init, last, slots, expected", [
    ("repeat_left", 4, [5, 6, 7, 8], [14, 14, None, None]),
    ("repeat_left", 1, [2, 3, 4], [11, None, None]),
    ("repeat_above", 4, [5, 6, 7, 8, 9], [11, 12, None, 14, 11]),
    ("repeat_above", 1, [2, 4, 5], [None, 10, 11]),
    ("sample_left", 4, [5, 6, 8], [25, 26, None]),
    ("sample_above", 4, [5, 6, 2], [25, 26, None]),
    ("random", 4, [5, 6], [None, None]),
])
def test_first_drafts(init, last, slots, expected):
  """Fresh slots copy or sample the nearest known neighbour, else are random.

  Slots 3 and 7 end rows; a neighbour beyond `last` is looked for further on.
  """
  drafts = first(init, last, slots)
  for i, (slot, token) in enumerate(zip(slots, expected, strict=True)):
    if slot % 4 == 3:
      continue
    assert 0 <= drafts.tokens[i] < 50
    assert bool(drafts.is_point[i]) == (
        token is not None and init.startswith("repeat"))
    if token is not None:
      assert drafts.tokens[i] == token
    else:
      np.testing.assert_allclose(drafts.q[i], 1 / 50)


@pytest.mark.parametrize("make", [
    lambda: SJD(0), lambda: SJD(init="left"), lambda: Coupled(tail="short"),
    lambda: Coupled(coupling="none"), lambda: SJD(acceptance="loose"),
    lambda: Continuation(-1),
])
def test_bad_settings_end_in_one_line(make):
  """An impossible setting is the user's mistake, told in one line."""
  with pytest.raises(UserError, match="^got .*expected.*$") as error:
    make()
  assert "\n" not in str(error.value)

"""Pictures of decoding: what is final, what is a draft, what is empty."""

import types

import numpy as np
from PIL import Image

from ssd_jax.visualization import animations
from ssd_jax.visualization.animations import Filling

COMMIT = np.array([[1, 2], [2, 4]])
BLANK = animations._BLANK


class Painter:
  """A stand-in for a pipeline whose code v is painted as v in all pixels."""

  def decode_images(self, tokens):
    cells = np.asarray(tokens, np.uint8).repeat(2, 1).repeat(2, 2)
    return np.stack([cells] * 3, -1)


def traced():
  """The output of a 2x2 image of passes as in COMMIT; 4 px tokens of 2."""
  history = np.zeros((1, 6, 2, 2), np.int32)
  history[0, 0] = [[10, 0], [0, 0]]
  history[0, 1] = [[10, 20], [30, 77]]
  history[0, 2] = [[10, 20], [30, 0]]  # the draft became code 0
  history[0, 3] = [[10, 20], [30, 40]]
  tokens = history[:, 3]
  return types.SimpleNamespace(
      history=history, tokens=tokens, images=Painter().decode_images(tokens),
      passes=np.array([4]), commit_pass=COMMIT[None], prompts=("a",),
      seconds=2.0)


def test_final_cells_are_shown_drafts_dimmed_the_rest_grey():
  """Each frame tells final tokens, drafts and empty tokens apart."""
  fill = animations.filling(Painter(), traced(), 0, "ar")
  np.testing.assert_array_equal(fill.shown, [1, 2, 3, 4])
  dim = lambda code: int((code + BLANK) / 2)
  expected = [
      [[10, BLANK], [BLANK, BLANK]], [[10, 20], [30, dim(77)]],
      [[10, 20], [30, dim(0)]], [[10, 20], [30, 40]]]
  np.testing.assert_array_equal(fill.frames[:, ::2, ::2, 0], expected)


def test_nothing_is_painted_where_nothing_is_drafted():
  """AR's frames come from the finished picture alone."""
  output = traced()
  output.history *= output.commit_pass[:, None] <= np.arange(1, 7)[
      None, :, None, None]
  fill = animations.filling(None, output, 0, "ar")
  np.testing.assert_array_equal(fill.frames[-1], output.images[0])


def fillings():
  """Two fillings of 8 and 2 passes in 4 and 2 seconds."""
  def make(label, passes, seconds):
    shades = np.arange(passes, dtype=np.uint8)[:, None, None, None]
    frames = np.broadcast_to(shades, (passes, 40, 40, 3))
    return Filling(label, frames, np.arange(passes) + 1, passes, seconds)

  return [make("ar", 8, 4.0), make("ssd", 2, 2.0)]


def test_both_race_in_the_same_time():
  """At each moment both show the passes done by then; both end finished."""
  frames = [np.asarray(x)[0] for x in animations.animation(fillings())]
  left, right = (np.array([f[i, 0] for f in frames]) for i in (0, 50))
  np.testing.assert_array_equal(left, [BLANK, *range(8)])
  np.testing.assert_array_equal(
      right, [BLANK, BLANK, 0, 0, 1, 1, 1, 1, 1])


def test_animation_is_a_gif_that_rests_at_the_end(tmp_path):
  """The file holds all frames and leaves nothing half-written behind."""
  path = tmp_path / "a.gif"
  animations.save_animation(animations.animation(fillings()), path)
  with Image.open(path) as gif:
    assert gif.n_frames >= 8 and gif.info["loop"] == 0
    gif.seek(gif.n_frames - 1)
    assert gif.info["duration"] == 2000
  assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_trace_writes_gif_frames_and_heat_map(tmp_path):
  """Per image an animation, its frames as PNG and a heat map."""
  paths = animations.write_trace(
      Painter(), traced(), [tmp_path / "0000_a"], "ar")
  assert all(path.exists() for path in paths)
  frames = list((tmp_path / "0000_a_filling").glob("*.png"))
  assert len(frames) == 5
  assert (tmp_path / "0000_a_passes.png").exists()


def test_heat_map_colours_passes():
  """Equal passes have one colour; first and last are the ends of the scale."""
  heat = np.asarray(animations.heat_map(COMMIT, (40, 40)))
  colours = heat[:40:20, :40:20].reshape(4, 3)
  np.testing.assert_array_equal(colours[0], animations._HEAT[0])
  np.testing.assert_array_equal(colours[3], animations._HEAT[-1])
  np.testing.assert_array_equal(colours[1], colours[2])
  assert np.asarray(animations.heat_map(np.ones((2, 2), int), (8, 8))).any()


def test_pareto_plot_is_written(tmp_path):
  """Points with and without intervals are generated, in as many panels as
  given."""
  points = [
      animations.Point("ar", True, 1.0, (0.9, 1.1), 0.0, (0.0, 0.0)),
      animations.Point("ssd", False, 4.0, (3.0, 5.0), 0.3, None)]
  panels = [animations.Panel("passes", "gap", points, (-0.1, 0.2)),
            animations.Panel("passes", "KID", points[1:], (-np.inf, 0.1)),
            animations.Panel("seconds", "KID", points, None)]
  for name, rows in (("one", [panels[:1]]), ("two", [panels[:2]]),
                     ("four", [panels[:2], panels[1:]])):
    animations.pareto(rows, tmp_path / f"{name}.png")
  one, two, four = (
      Image.open(tmp_path / f"{name}.png") for name in ("one", "two", "four"))
  assert one.width > 500 and two.width > 1.5 * one.width
  assert four.width == two.width and four.height == 2 * two.height
  animations.pareto([], tmp_path / "none.png")
  assert len(list(tmp_path.iterdir())) == 3

"""Requests of the Images API: understood, or refused in its own shape."""

import io

from hypothesis import given, settings, strategies as st
from PIL import Image
import pytest

from ssd_jax.core.grid import Grid
from ssd_jax.decoding import registry
from ssd_jax.decoding.ar import AR
from ssd_jax.serving import batches, edits
from ssd_jax.serving.fair_queue import FairQueue
from ssd_jax.serving.requests import ApiError, Limits, Served, parse

SERVED = Served(("greys", "gpt-image-1"), "8x8", {"ar": AR()},
                limits=Limits(prompt=300, images=4))


@pytest.mark.parametrize("values, status, param", [
    (None, 400, None),
    ([], 400, None),
    (dict(), 400, "prompt"),
    (dict(prompt=""), 400, "prompt"),
    (dict(prompt=3), 400, "prompt"),
    (dict(prompt="x" * 301), 400, "prompt"),
    (dict(prompt="a", model="dall-e-3"), 404, "model"),
    (dict(prompt="a", model=["greys"]), 404, "model"),
    (dict(prompt="a", n=0), 400, "n"),
    (dict(prompt="a", n=5), 400, "n"),
    (dict(prompt="a", n=True), 400, "n"),
    (dict(prompt="a", n=1.5), 400, "n"),
    (dict(prompt="a", size="1024x1024"), 400, "size"),
    (dict(prompt="a", quality="best"), 400, "quality"),
    (dict(prompt="a", background="transparent"), 400, "background"),
    (dict(prompt="a", output_format="gif"), 400, "output_format"),
    (dict(prompt="a", output_compression=101), 400, "output_compression"),
    (dict(prompt="a", response_format="file"), 400, "response_format"),
    (dict(prompt="a", stream="yes"), 400, "stream"),
    (dict(prompt="a", stream=True, partial_images=4), 400, "partial_images"),
    (dict(prompt="a", partial_images=1), 400, "partial_images"),
    (dict(prompt="a", seed=-1), 400, "seed"),
    (dict(prompt="a", seed=2**32), 400, "seed"),
    (dict(prompt="a", decoder="stair"), 400, "decoder"),
    (dict(prompt="a", decoder=["ar"]), 400, "decoder"),
    (dict(prompt="a", guidance_scale="3"), 400, "guidance_scale"),
    (dict(prompt="a", negative_prompt="b"), 400, "negative_prompt"),
    (dict(prompt="a", num_inference_steps=30), 400, "num_inference_steps"),
    (dict(prompt="a", svg={}), 400, "svg"),
])
def test_what_cannot_be_honoured_is_named(values, status, param):
  """One line that says what is served, with the field at fault."""
  with pytest.raises(ApiError, match="Expected .*got") as caught:
    parse(values, SERVED, "")
  error = caught.value
  assert (error.status, error.param) == (status, param)
  assert "\n" not in str(error) and error.retry_after is None


def test_what_changes_no_picture_is_ignored():
  """Nulls are fields not given; what clients send by default is accepted."""
  found = parse(dict(
      prompt=" red heart", model="gpt-image-1", n=None, size="auto",
      quality="hd", background="auto", moderation="low", style="vivid",
      user="me", new_field={"a": 1}, seed=7, guidance_scale=2, top_k=5),
      SERVED, "1.2.3.4")
  assert (found.prompt, found.images, found.seed) == (" red heart", 1, 7)
  assert found.sampling == dict(guidance=2, top_k=5)
  assert found.decoder == AR() and found.client == "1.2.3.4 me"
  drawn = {parse(dict(prompt="a"), SERVED, "").seed for _ in range(3)}
  assert len(drawn) == 3  # none given: another one each time


@settings(max_examples=300, deadline=None)
@given(st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4),
    st.fixed_dictionaries({}, optional=dict(
        prompt=st.text() | st.integers(), n=st.integers() | st.floats(),
        decoder=st.text() | st.builds(
            "{}:{}".format, st.sampled_from(["ar", "sjd", "stair", "mtp"]),
            st.text("a=+:,0123456789-windoe.", max_size=20)),
        seed=st.integers() | st.floats(), stream=st.booleans() | st.none(),
        partial_images=st.integers(), output_format=st.text(),
        temperature=st.floats() | st.none() | st.text()))))
def test_any_json_is_a_request_or_one_line(values):
  """Whatever is sent, it is understood or refused in one line."""
  served = Served(("greys",), "8x8", {"ar": AR()}, registry.parse, Limits())
  try:
    found = parse(values, served, "")
  except ApiError as error:
    assert "Expected " in str(error) and "\n" not in str(error).strip()
    assert error.status in (400, 404)
    return
  assert found.prompt.strip() and 1 <= found.images <= 10


def test_clients_take_turns():
  """Ten images of one client delay another's by one; what nobody wants goes."""
  queue = FairQueue()
  for number in range(10):
    queue.put("many", number)
  queue.put("one", 100)
  every = lambda _: True
  assert [queue.take(every) for _ in range(3)] == [0, 100, 1]
  assert queue.take(lambda x: x > 5) == 6
  assert queue.drop(lambda x: x % 2 == 0) == [2, 4, 8]
  assert list(queue) == [3, 5, 7, 9] and len(queue) == 4
  assert queue.take(lambda x: x > 50) is None


def test_forms_are_no_way_around_the_limits():
  """Text that nests too deeply stays text; few bytes may not be many pixels."""
  deep = "[" * 60_000
  assert edits._value("seed", deep) == deep
  assert edits._value("stream", "True") is True
  file = io.BytesIO()
  Image.new("1", (8192, 8192)).save(file, "PNG")
  small = io.BytesIO()
  Image.new("RGB", (8, 8)).save(small, "PNG")
  for files, param in (
      ({"image": file.getvalue()}, "image"),
      ({"image": small.getvalue(), "mask": file.getvalue()}, "mask")):
    with pytest.raises(ApiError, match="8192x8192") as caught:
      edits.kept_rows({}, files, Grid(4, 4), (8, 8, 3), lambda images: images)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_host_that_fails_alone_ends(monkeypatch):
  """What fails on the first host too is no end: it forgets what it began."""
  calls = iter([("clear", (None,), {}), ("failed", (), {}), ("idle", (), {}),
                ("clear", (None,), {}), ("idle", (), {}), None])
  monkeypatch.setattr(batches, "_receive", lambda: next(calls))
  with pytest.raises(RuntimeError, match="first host"):
    batches.Batches(None, 1).follow()
  assert next(calls) is None

"""Edits of the Images API: an image is completed below what is kept."""

import base64
import io

from hypothesis import HealthCheck, given, settings, strategies as st
import numpy as np
import openai
from PIL import Image
import pytest

from ssd_jax.pipeline import testing
from tests.support import served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=4, cols=4, guidance=2.0, heads=(0, 0))


@pytest.fixture(scope="module")
def client(pipe):
  with served.site(pipe, ("ar",), batch=1) as (address, _):
    yield openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def post(client, fields, files):
  """Sends a form as it is."""
  client.post("/images/edits", body=fields, files=files, cast_to=object,
              options={"headers": {"Content-Type": "multipart/form-data"}})


def mask_below(row, size=8):
  """A mask whose pixels from `row` on are transparent."""
  pixels = np.full((size, size, 4), 255, np.uint8)
  pixels[row:] = 0
  return png(pixels)


@pytest.fixture(scope="module")
def own(pipe):
  """(PNG of an image, its tokens as the tokenizer reads them)."""
  image = pipe.generate(["a"], seed=3).images
  return png(image[0]), pipe.encode_images(image)[0]


@pytest.mark.parametrize("more, rows", [
    ({}, 2), (dict(mask=mask_below(48, 64)), 3),
    (dict(extra_body=dict(rows=1)), 1)])
def test_the_rest_is_what_generate_makes(client, pipe, own, more, rows):
  """Half of the rows are kept, or those above the mask, or so many."""
  body = more.pop("extra_body", {}) if more else {}
  reply = client.images.edit(
      image=own[0], prompt="b", extra_body=body | dict(seed=5), n=2, **more)
  expected = pipe.generate(
      ["b"], seed=5, num_images=2, prefix=own[1][:rows]).images
  for image, drawn in zip(reply.data, expected, strict=True):
    found = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
    np.testing.assert_array_equal(np.asarray(found), drawn)


def test_events_are_those_of_edits(client, own):
  """A stream ends with image_edit.completed."""
  events = list(client.images.edit(image=own[0], prompt="b", stream=True))
  assert [event.type for event in events] == ["image_edit.completed"]


@pytest.mark.parametrize("form, error", [
    (dict(image=b"no image"), "image that can be read"),
    (dict(mask=b"no image"), "PNG as mask"),
    (dict(mask=mask_below(0)), "keep 1 to 3 rows"),
    (dict(mask=mask_below(8)), "keep 1 to 3 rows"),
    (dict(mask=png(np.eye(8, dtype=np.uint8)[..., None] * np.full(
        4, 255, np.uint8))), "transparent from some row"),
    (dict(extra_body=dict(rows=4)), "keep 1 to 3 rows"),
    (dict(extra_body=dict(rows="many")), "keep 1 to 3 rows"),
    (dict(n="two"), "n to be a whole number"),
    (dict(prompt=""), "a prompt"),
])
def test_forms_that_cannot_be_honoured(client, own, form, error):
  """One line that names the field, never a 500."""
  with pytest.raises(openai.BadRequestError, match=error):
    client.images.edit(**{"image": own[0], "prompt": "b", **form})


_TEXTS = st.sampled_from(["", "-1", "3", "1e9", "null", "true", "[", "{}", "a",
                          "\0", "\U0001f600", "9" * 400])
_FIELDS = st.dictionaries(st.sampled_from([
    "prompt", "n", "seed", "size", "rows", "decoder", "top_p", "stream",
    "guidance_scale", "partial_images", "output_format", "model", "x"]), _TEXTS)
_WHOLE = png(np.zeros((8, 8, 3), np.uint8))
_FILES = st.dictionaries(
    st.sampled_from(["image", "image[]", "mask", "prompt", "y"]), st.one_of(
        st.binary(max_size=40), st.just(_WHOLE), st.just(mask_below(4)),
        st.integers(1, len(_WHOLE)).map(lambda n: _WHOLE[:n])))


@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=_FIELDS, files=_FILES)
def test_any_form_has_an_answer(client, fields, files):
  """An image, or the API's error object; never a 500."""
  try:
    post(client, fields, files or {"y": b""})
  except (openai.BadRequestError, openai.NotFoundError) as error:
    assert error.body["message"] and error.type == "invalid_request_error"


def test_a_form_without_an_image_is_told_so(client):
  """Two of the same part, no part, a part of the wrong kind."""
  files = {"image": ("a.png", png(np.zeros((8, 8, 3), np.uint8)))}
  for body, parts in ((dict(prompt="a"), {"other": b"1"}),
                      (dict(prompt="a", image="text"), {"mask": b"1"}),
                      (dict(prompt="a"), {**files, "prompt": b"file"})):
    with pytest.raises(openai.BadRequestError, match="Expected"):
      post(client, body, parts)

"""What the server publishes is what it does: OpenAPI, and OpenAI's client."""

import asyncio
import json
import urllib.error
import urllib.request

from hypothesis import HealthCheck, given, settings, strategies as st
import openai
import openapi_schema_validator
from openapi_spec_validator import validate
import pytest

from ssd_jax.decoding.ar import AR
from ssd_jax.serving.openapi import document
from ssd_jax.serving.requests import Limits, Served
from tests.support import chains, served

SERVED = Served(("greys", "gpt-image-1"), "8x8", {"ar": AR()},
                limits=Limits(prompt=300, images=2))
SCHEMA = document(SERVED)["components"]["schemas"]["Request"]
VALIDATOR = openapi_schema_validator.OAS31Validator(SCHEMA)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@pytest.fixture(scope="module")
def site():
  with served.site(chains.pipeline(4, 4), ("ar",), batch=1, images=2,
                   prompt=300) as found:
    yield found[0]


def generations(site, values):
  """(status, body) of a request."""
  request = urllib.request.Request(
      site + "/v1/images/generations", json.dumps(values).encode(),
      {"Content-Type": "application/json"})
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.status, answer.read()
  except urllib.error.HTTPError as error:
    return error.code, error.read()


def of_schema(schema):
  """Values that a property's schema allows."""
  if "enum" in schema:
    return st.sampled_from(schema["enum"])
  kinds = schema["type"] if isinstance(schema["type"], list) else [
      schema["type"]]
  low = schema.get("minimum", schema.get("exclusiveMinimum"))
  return st.one_of(*({
      "integer": st.integers(low, schema.get("maximum")),
      "number": st.floats(low, schema.get("maximum"), exclude_min=(
          "exclusiveMinimum" in schema)),
      "string": st.text(max_size=30), "boolean": st.booleans(),
      "null": st.none()}[kind] for kind in kinds))


def of_request(schema):
  """Objects with some of the properties; not all are valid together."""
  values = {k: of_schema(v) for k, v in schema["properties"].items()}
  values["size"] = st.sampled_from(["auto", None])
  prompt = {"prompt": values.pop("prompt")}
  return st.fixed_dictionaries(prompt, optional=values)


def test_the_document_is_openapi(site):
  """A validator accepts it, and it names each route of the API."""
  with urllib.request.urlopen(site + "/openapi.json") as answer:
    found = json.loads(answer.read())
  validate(found)
  assert {"/v1/images/generations", "/v1/images/edits", "/v1/models",
          "/health", "/ready", "/metrics"} <= set(found["paths"])


@settings(max_examples=60, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(of_request(SCHEMA).filter(VALIDATOR.is_valid))
def test_what_the_schema_allows_is_drawn(site, values):
  """Any valid request gets its pictures, or a 429."""
  status, body = generations(site, values)
  assert status in (200, 429), (values, body)


@settings(max_examples=150, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(of_request(SCHEMA), st.sampled_from(sorted(SCHEMA["properties"])), JSON)
def test_what_the_schema_forbids_is_refused(site, values, name, wrong):
  """A request with a wrong field gets a 4xx error, never a 500."""
  values = {**values, name: wrong}
  status, body = generations(site, values)
  is_valid = VALIDATOR.is_valid(values)
  assert status in ((200, 429) if is_valid else (400, 404)), (values, body)
  if status in (400, 404):
    assert json.loads(body)["error"]["message"].startswith("Expected")


def test_a_wrong_path_or_method_is_told(site):
  """404 names the path, 405 the methods, in the API's shape."""
  for path, method, status, code in (
      ("/v1/nothing", "GET", 404, "not_found"),
      ("/v1/images/generations", "GET", 405, "method_not_allowed")):
    with pytest.raises(urllib.error.HTTPError) as caught:
      urllib.request.urlopen(urllib.request.Request(site + path, method=method))
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["code"]) == (status, code)
    assert error["message"].startswith("Expected")
    assert (status == 405) == ("POST" in caught.value.headers.get("Allow", ""))


def test_the_asynchronous_client(site):
  """Pictures and events of several requests at once."""

  async def ask():
    async with openai.AsyncOpenAI(
        base_url=site + "/v1", api_key="none", max_retries=0) as client:
      replies = await asyncio.gather(*(
          client.images.generate(prompt="a", n=2, extra_body=dict(seed=seed))
          for seed in range(4)))
      assert [reply.data[1].seed for reply in replies] == [0, 1, 2, 3]
      stream = await client.images.generate(
          prompt="a", stream=True, partial_images=1)
      kinds = [event.type async for event in stream]
      assert kinds[-1] == "image_generation.completed"
      with pytest.raises(openai.BadRequestError):
        await client.images.generate(prompt="a", n=3)

  asyncio.run(ask())

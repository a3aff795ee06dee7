"""Deployments say what the server understands, and leave it time to drain."""

import configparser
import json
import re
import shlex

from absl import flags
import kubernetes_validate
import pytest
import yaml

from ssd_jax.cli import serve
from ssd_jax.decoding.ar import AR
from ssd_jax.serving.openapi import document
from ssd_jax.serving.requests import Served
from tests.support import ROOT, bad_inputs

FOLDER = ROOT / "docs" / "deploy"
DOCKER = (FOLDER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
SERVICE = COMPOSE["services"]["images"]
POD = KUBERNETES[0]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
ENTRY = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKER, re.M)[1])


def drain_of(args):
  return float(dict(x.split("=", 1) for x in args)["--drain"])


@pytest.mark.parametrize("args", [SERVICE["command"], CONTAINER["args"]])
def test_the_server_takes_these_flags(args, tmp_path):
  """Flags of the image and of each deployment, by the command's own parser."""
  def look():
    assert (flags.FLAGS.host, flags.FLAGS.port) == ("0.0.0.0", 8000)
    assert serve._decoders()

  assert bad_inputs.feed(
      "serve", [*ENTRY[1:], *args], tmp_path, look)[:2] == (0, "")
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  assert f"\n{ENTRY[0]} = " in setup["options.entry_points"]["console_scripts"]
  assert "serve" in setup["options.extras_require"]


def test_there_is_time_to_drain_and_a_key():
  """No kill before --drain is over; every way in needs a key."""
  grace = POD["terminationGracePeriodSeconds"]
  before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
  assert grace > before + drain_of(CONTAINER["args"])
  assert float(SERVICE["stop_grace_period"].removesuffix("s")) > drain_of(
      SERVICE["command"])
  assert SERVICE["environment"].keys() == {serve._KEY}
  assert [x["name"] for x in CONTAINER["env"]] == [serve._KEY]


def test_probes_ask_for_what_is_served():
  """Ready means /ready, alive means /health, on the port that is open."""
  paths = document(Served(("a",), "8x8", {"ar": AR()}))["paths"]
  probe = lambda name: CONTAINER[f"{name}Probe"]["httpGet"]["path"]
  assert probe("readiness") == "/ready" in paths
  assert probe("liveness") == probe("startup") == "/health" in paths
  assert "8000/ready" in shlex.join(SERVICE["healthcheck"]["test"])
  assert CONTAINER["ports"][0]["containerPort"] == 8000
  assert SERVICE["ports"] == ["127.0.0.1:8000:8000"]


@pytest.mark.parametrize("part", KUBERNETES, ids=lambda part: part["kind"])
def test_kubernetes_knows_every_field(part):
  """Kubernetes' own schema, no unknown field."""
  kubernetes_validate.validate(part, "1.33", strict=True)

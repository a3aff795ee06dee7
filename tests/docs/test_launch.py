"""Launch scripts of training start commands that exist, and can be parsed."""

import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
import kubernetes_validate
import pytest
import yaml

from ssd_jax.runtime import sharding
from tests.support import ROOT, bad_inputs

FOLDER = ROOT / "docs" / "deploy" / "train"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
JOBSET = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]


def commands(text):
  """(module, arguments) of the trainings that a file starts."""
  text = " ".join(text.replace("\\\n", " ").split())
  default = dict(re.findall(r"(\w+)=\$\{\w+:-([^}]*)\}", text))
  for line in re.findall(
      r"python -m (train\.\w+ [^&|\"]*(?:\"\$mesh\")?[^&|\"]*)", text):
    words = shlex.split(line.partition(" python ")[0])
    words = words[:next((i for i, x in enumerate(words)
                         if x in ("test", "srun", "scontrol", "}")),
                        len(words))]
    yield words[0], [re.sub(r"\$(\w+)", lambda m: default[m[1]], x)
                     for x in words[1:]]


@pytest.mark.parametrize("file", [*SCRIPTS, FOLDER / "jobset.yaml"],
                         ids=lambda file: file.name)
def test_trainings_take_these_flags(file, tmp_path, monkeypatch):
  """Settings and meshes, by the commands' own parsers."""
  monkeypatch.chdir(ROOT)
  found = list(commands(file.read_text()))
  assert {"train.mtp"} <= {module for module, _ in found}

  def look():
    assert flags.FLAGS.config.family == "lumina"
    sharding.parse(flags.FLAGS.mesh)

  for module, args in found:
    assert bad_inputs.feed(module.rpartition(".")[2], args, tmp_path, look)[
        :2] == (0, "")


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shells_can_read_the_scripts(file):
  """As shellcheck judges; they stop at the first command that fails."""
  subprocess.run(["bash", "-n", file], check=True)
  checker = pathlib.Path(sys.executable).with_name("shellcheck")
  if checker.exists():  # of the extra test
    subprocess.run([checker, file], check=True)
  assert "\nset -euo pipefail\n" in file.read_text()


def test_kubernetes_knows_the_jobs_fields():
  """The job within the set, by Kubernetes' own schema; a pod per host."""
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
         "spec": JOB}
  kubernetes_validate.validate(job, "1.33", strict=True)
  rows, cols = map(int, POD["nodeSelector"][
      "cloud.google.com/gke-tpu-topology"].split("x"))
  chips = int(POD["containers"][0]["resources"]["limits"]["google.com/tpu"])
  assert JOB["completions"] == JOB["parallelism"] == rows * cols // chips


def test_slurm_starts_a_process_per_gpu():
  """JAX gives each of Slurm's processes one device of its node."""
  options = dict(re.findall(
      r"^#SBATCH --([\w-]+)=(\S+)$", (FOLDER / "slurm.sh").read_text(), re.M))
  assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
  [(_, args), *_] = commands((FOLDER / "slurm.sh").read_text())
  mesh = sharding.parse(args[args.index("--mesh") + 1])
  assert mesh["data"] == 8 * int(options["nodes"])

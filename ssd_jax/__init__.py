"""ssd_jax: fast generation with autoregressive image models."""

from ssd_jax.core.outputs import Output
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.gsd import GSD
from ssd_jax.decoding.jacobi.sjd import SJD, Continuation, Coupled
from ssd_jax.decoding.mtp import MTP
from ssd_jax.decoding.rows.pjd import PJD
from ssd_jax.decoding.rows.ssd import SSD
from ssd_jax.decoding.rows.stair import Exact, Stair
from ssd_jax.decoding.rows.zipar import ZipAR
from ssd_jax.decoding.trees.eagle import Eagle
from ssd_jax.decoding.trees.relaxed import Cascade, Lantern, LanternPP
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.model_folder import load
from ssd_jax.pipeline.painting import paint
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime.progress import Progress

__version__ = "0.1.0"

__all__ = [
  "AR",
  "Cascade",
  "Continuation",
  "Coupled",
  "DecoderBase",
  "Eagle",
  "Exact",
  "GSD",
  "Lantern",
  "LanternPP",
  "MTP",
  "Needs",
  "Output",
  "PJD",
  "Pipeline",
  "Progress",
  "SJD",
  "SSD",
  "Stair",
  "ZipAR",
  "load",
  "paint",
  "testing",
]

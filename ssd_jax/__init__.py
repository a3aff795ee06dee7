"""ssd_jax: autoregressive pictures, many tokens per pass."""

from ssd_jax import testing
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.gsd import GSD
from ssd_jax.decoding.jacobi import SJD, Continuation, Coupled
from ssd_jax.decoding.mtp import MTP
from ssd_jax.decoding.pjd import PJD
from ssd_jax.decoding.relaxed import Cascade, Lantern, LanternPP
from ssd_jax.decoding.ssd import SSD
from ssd_jax.decoding.stair import Exact, Stair
from ssd_jax.decoding.tree import Eagle
from ssd_jax.decoding.zipar import ZipAR
from ssd_jax.drawn import Output
from ssd_jax.loading import load
from ssd_jax.pipeline import Pipeline
from ssd_jax.progress import Progress

__version__ = "0.1.0"

__all__ = [
    "AR", "Cascade", "Continuation", "Coupled", "Eagle", "Exact", "GSD",
    "Lantern", "LanternPP", "MTP", "Output", "PJD", "Pipeline", "Progress",
    "SJD", "SSD", "Stair", "ZipAR", "load", "testing",
]

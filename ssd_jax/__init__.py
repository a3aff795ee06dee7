"""ssd_jax: autoregressive pictures, many tokens per pass."""

from ssd_jax.decoding.ar import AR
from ssd_jax.pipeline import Output, Pipeline, load

__version__ = "0.1.0"

__all__ = ["AR", "Output", "Pipeline", "load"]

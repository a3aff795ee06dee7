"""What several tests share; nothing here is collected by pytest."""

import importlib.metadata
import pathlib

ROOT = pathlib.Path(__file__).parents[2]  # of the checkout

# Compiling takes a quarter less time without fusion emitters. XLA ends the
# process at a flag that it does not know, as later versions do not know this.
QUICK_FLAGS = " --xla_cpu_use_fusion_emitters=false" if (
    importlib.metadata.version("jaxlib").startswith("0.10.")) else ""

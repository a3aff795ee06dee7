"""Settings of the whole suite.

Most of its time goes into compiling programs that then run for milliseconds, so
they are compiled with few optimisations.
"""

import jax

jax.config.update("jax_disable_most_optimizations", True)

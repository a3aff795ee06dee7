"""python -m infer.benchmark --decoders ar,ar:seed=1,exact --num_prompts 64"""

from ssd_jax.cli import benchmark

if __name__ == "__main__":
  benchmark.main()

"""The live page: `python -m infer.demo`, then http://127.0.0.1:7860"""

from ssd_jax.cli import demo

if __name__ == "__main__":
  demo.main()

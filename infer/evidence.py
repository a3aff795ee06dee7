"""python -m infer.evidence --num_prompts 64 --out evidence"""

from ssd_jax.cli import evidence

if __name__ == "__main__":
  evidence.main()

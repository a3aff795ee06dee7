"""python -m infer.plan --config configs/lumina.py --topology v5e:2x4"""

from ssd_jax.cli import plan

if __name__ == "__main__":
  plan.main()

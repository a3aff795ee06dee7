#!/usr/bin/env bash
# Heads and a drafter for Lumina-mGPT on one machine with eight GPUs, in the
# checkout; started again, it goes on where it was.
set -euo pipefail
mesh=${MESH:-data=8}
python -m train.mtp --config configs/lumina.py --mesh "$mesh" \
  --config.mtp.draw.batch=64
python -m train.drafter --config configs/lumina.py --mesh "$mesh" \
  --config.drafter.redundancy=0.1

#!/usr/bin/env bash
#SBATCH --job-name=heads
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=heads-%j.log
# Heads and a drafter for Lumina-mGPT on two nodes of eight GPUs:
#
#   sbatch docs/deploy/train/slurm.sh     # in the checkout, on a shared disk
#
# A process per GPU, as JAX expects of Slurm, finds the others by its variables.
# Two minutes before the time is over each gets SIGTERM, saves and ends; the job
# is queued again until its last part is there.
set -euo pipefail
# shellcheck source=/dev/null
. "${ENVIRONMENT:-$HOME/env}/bin/activate"
mesh=${MESH:-data=16}
srun python -m train.mtp --config configs/lumina.py --mesh "$mesh" \
  --config.mtp.draw.batch=128
test -f runs/lumina_768/model/heads/heads.json &&
  srun python -m train.drafter --config configs/lumina.py --mesh "$mesh" \
    --config.drafter.redundancy=0.1
test -f runs/lumina_768/model/drafter/drafter.json ||
  scontrol requeue "$SLURM_JOB_ID"

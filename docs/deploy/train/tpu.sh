#!/usr/bin/env bash
# Heads and a drafter for Lumina-mGPT on a slice of Cloud TPUs, which is asked
# for as a queued resource (a spot one with SPOT=1) and given back at the end.
#
#   PROJECT=... ZONE=us-west4-a BUCKET=... bash tpu.sh
#
# BUCKET holds ssd_jax (the checkout, with dist/*.whl, prompts.txt and
# models/lumina_768) and all that is written; gcsfuse mounts it on every host.
# A slice that is taken away is asked for again, and the run goes on.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
name=${NAME:-heads} type=${TYPE:-v5litepod-16} mesh=${MESH:-data=4,tensor=4}
version=${VERSION:-v2-alpha-tpuv5-lite}
tpu() { gcloud compute tpus "$@" --project "$PROJECT" --zone "$ZONE"; }
state() {
  tpu queued-resources describe "$name" --format "value(state.state)" || true
}
on_all() { tpu tpu-vm ssh "$name" --worker=all --command "$1"; }
remove() { tpu queued-resources delete "$name" --quiet --force || true; }

setup="set -e
mountpoint -q /mnt/shared || {
  sudo apt-get install -y gcsfuse python3.11-venv
  sudo mkdir -p /mnt/shared && sudo chown \$USER /mnt/shared
  gcsfuse --implicit-dirs --rename-dir-limit=100000 $BUCKET /mnt/shared
}
test -d ~/env || python3.11 -m venv ~/env
~/env/bin/pip install --quiet \"\$(ls /mnt/shared/ssd_jax/dist/*.whl)[tpu,text]\""
train="cd /mnt/shared/ssd_jax && . ~/env/bin/activate &&
python -m train.mtp --config configs/lumina.py --mesh $mesh \
  --config.mtp.draw.batch=64 --config.mtp.loop.accumulate=8 &&
python -m train.drafter --config configs/lumina.py --mesh $mesh \
  --config.drafter.redundancy=0.1"

trap remove EXIT
for try in $(seq "${TRIES:-20}"); do
  tpu queued-resources create "$name" --node-id "$name" \
    --accelerator-type "$type" --runtime-version "$version" ${SPOT:+--spot}
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) break ;; esac
    sleep 60
  done
  # SIGTERM ends a run with status 0, so what was written decides.
  if on_all "$setup" && on_all "$train" &&
    on_all "cd /mnt/shared/ssd_jax &&
      test -f runs/lumina_768/model/drafter/drafter.json"
  then
    exit 0
  fi
  echo "try $try ended; asking for another slice" >&2
  remove
done
exit 1

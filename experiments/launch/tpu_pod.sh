#!/usr/bin/env bash
# The same command on every host of a TPU pod slice.
#
#   TPU=my-pod ZONE=us-east5-a WORKDIR=gs-mount/runs/first \
#     bash experiments/launch/tpu_pod.sh --config=configs/quickstart.py --config.mesh.fsdp=-1
#
# WORKDIR lies on a file system that all hosts see (Filestore, or a bucket mounted with gcsfuse).
# The code lies in ~/ppo_jax on every host, with its packages in ~/venv; the first start brings both.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}" "${WORKDIR:?a folder that all hosts see}"

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${SETUP:-}" = 1 ]; then  # once: SETUP=1 bash experiments/launch/tpu_pod.sh
  tar czf /tmp/ppo_jax.tgz --exclude=.git --exclude=runs .
  gcloud compute tpus tpu-vm scp /tmp/ppo_jax.tgz "$TPU": --zone="$ZONE" --worker=all
  on_all "mkdir -p ppo_jax && tar xzf ppo_jax.tgz -C ppo_jax && python3 -m venv venv &&
          venv/bin/pip install 'jax[tpu]' -e 'ppo_jax[quickstart]'"
  exit
fi

# A preempted pod gets SIGTERM on its hosts: every one saves the same step, and the same command
# goes on from there.
arguments=$(printf '%q ' "$@")
on_all "cd ppo_jax && ../venv/bin/python experiments/rlhf.py --multihost --workdir=$WORKDIR $arguments"

#!/usr/bin/env bash
# A sweep over several TPU pod slices: a point at a time on each, over all of its hosts.
#
#   TPUS="slice-0 slice-1 slice-2" ZONE=us-east5-a WORKDIR=gs-mount/runs/kl \
#     bash experiments/launch/sweep_pods.sh --config=configs/quickstart.py \
#     --grid="ppo.kl_coef=0,0.02,0.05,0.2; seed=0:3"
#
# WORKDIR lies on a file system that all hosts of all slices see. Code and packages come to each
# slice as for one pod: SETUP=1 TPU=slice-0 ... bash experiments/launch/tpu_pod.sh
set -euo pipefail
: "${TPUS:?the names of the TPUs}" "${ZONE:?their zone}" "${WORKDIR:?a folder that all hosts see}"

read -ra slices <<< "$TPUS"
arguments=$(printf '%q ' "$@")
pids=()
for i in "${!slices[@]}"; do
  gcloud compute tpus tpu-vm ssh "${slices[$i]}" --zone="$ZONE" --worker=all --command="cd ppo_jax &&
    ../venv/bin/python experiments/sweep.py --multihost --shard=$i/${#slices[@]} \
    --workdir=$WORKDIR $arguments" &
  pids+=($!)
done
code=0  # the same command goes on with what is missing
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"

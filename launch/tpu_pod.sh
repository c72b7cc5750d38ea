#!/usr/bin/env bash
# A run on a Cloud TPU pod slice: makes the slice, installs, starts the same command on every host. JAX finds the hosts itself.
#
#   TPU=my-slice ZONE=us-east5-a TYPE=v6e-64 BUCKET=/mnt/runs launch/tpu_pod.sh --config=configs/fp8_base.py:8b
#
# What to change: the four variables, VERSION (the runtime image of your generation), REPOSITORY, and the mesh. TPU v7 has FP8
# units; v5p and v6e run the same programs with FP8 values multiplied in BF16. Run it again to continue; DRY_RUN=1 only prints
# the commands. The workdir must be one file system on all hosts (Filestore, or a bucket mounted with gcsfuse at BUCKET).
set -euo pipefail

TPU="${TPU:-fp8jax}" ZONE="${ZONE:-us-east5-a}" TYPE="${TYPE:-v6e-64}" VERSION="${VERSION:-v2-alpha-tpuv6e}"
BUCKET="${BUCKET:-/mnt/runs}" REPOSITORY="${REPOSITORY:-https://github.com/OWNER/fp8jax}"

# A slice's links are equally fast in all directions: fsdp over all chips. Between slices (MEGASCALE) only data may go.
mesh="--config.mesh.fsdp=-1"

# --- Flags, each with its reason ---------------------------------------------------------------------------------------
# Collectives run beside the matrix unit: gathers of weights and scatters of gradients as asynchronous fusions.
xla="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
xla+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true"
xla+=" --xla_enable_async_all_gather=true"

run() {
    if [ "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
everywhere() {
    run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${DRY_RUN:-}" ] || ! gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" >/dev/null 2>&1; then
    run gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
fi
everywhere "test -d fp8jax || git clone $REPOSITORY fp8jax; cd fp8jax && python3 -m venv .venv && .venv/bin/pip install -q -r requirements-tpu.txt"
# LIBTPU_INIT_ARGS reaches the TPU's compiler, XLA_FLAGS does not. A compilation cache beside the runs survives the slice.
everywhere "cd fp8jax && LIBTPU_INIT_ARGS='$xla' JAX_COMPILATION_CACHE_DIR='$BUCKET/.jax_cache' .venv/bin/python train.py $mesh --workdir='$BUCKET/run' $*"

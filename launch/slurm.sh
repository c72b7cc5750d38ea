#!/usr/bin/env bash
# A run on several nodes of 8 GPUs under Slurm: one process a GPU, found by `srun` without any address.
#
#   sbatch launch/slurm.sh --config=configs/fp8_base.py:8b --workdir=/shared/runs/8b
#
# What to change: the #SBATCH lines of your cluster (nodes, partition, account, time), FP8JAX_VENV, and the mesh below. The
# workdir must be on a file system that all nodes see. Submitting again with the same --workdir continues the run; --requeue
# does so by itself, after a failed node as well.
#SBATCH --job-name=fp8jax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the time is up every process gets SIGUSR1: the run saves, exits with 4, and is put back into the queue.
#SBATCH --signal=USR1@300
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
. "${FP8JAX_VENV:-.venv}/bin/activate"

# data goes between nodes over InfiniBand, fsdp within a node over NVLink: docs/scaling.md says from where on another mesh pays.
nodes="${SLURM_JOB_NUM_NODES:-8}"
mesh=(--config.mesh.data="$nodes" --config.mesh.fsdp=8)

# --- Flags, each with its reason ---------------------------------------------------------------------------------------
# Overlap: collectives run while the GEMMs before and after them do. Without the first flag the others change nothing.
xla=(--xla_gpu_enable_latency_hiding_scheduler=true)
# Weights of the next layer are gathered during this one, gradients of the last scattered: loops hide their first and last
# collective only if they are pipelined across iterations.
xla+=(--xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true)
# One large collective instead of many small ones; larger than a layer's weights, or combining stops at the first few.
xla+=(--xla_gpu_all_gather_combine_threshold_bytes=1073741824 --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824)
xla+=(--xla_gpu_all_reduce_combine_threshold_bytes=1073741824)
export XLA_FLAGS="${xla[*]} ${XLA_FLAGS:-}"
# JAX takes 75% of a GPU's memory by default; NCCL's buffers and the CUDA context need 2 to 4 GB, the rest is the run's.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# `default` (BFC) reuses its arena: the fastest. `platform` is slow, but frees at once: for finding out what does not fit.
export XLA_PYTHON_CLIENT_ALLOCATOR="${XLA_PYTHON_CLIENT_ALLOCATOR:-default}"
# Hopper: with one connection, kernels that wait for a collective and the collective itself start in the order of issue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Collectives inside a node read user buffers directly over NVLink SHARP where the switches can; NCCL falls back by itself.
export NCCL_NVLS_ENABLE=1
# A broken link shows as an error with its name instead of as silence.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Name the fabric where NCCL picks a wrong one, an Ethernet port say: NCCL_IB_HCA=mlx5, NCCL_SOCKET_IFNAME=ib0.
# Compiled programs are kept between restarts; a shared directory compiles once for all processes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/fp8jax}"

# All end when one fails (--kill-on-bad-exit): a process that waits for a lost one only holds GPUs.
code=0
srun --kill-on-bad-exit=1 --cpu-bind=none python train.py "${mesh[@]}" "$@" || code=$?

# 4: saved on request. Above 128: killed. 1: a process was lost, or a hang was ended. All continue from the newest checkpoint;
# a fault that comes back every time stops being tried after 20 starts.
if { [ "$code" = 4 ] || [ "$code" = 1 ] || [ "$code" -gt 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

# shellcheck shell=bash
# What differs between sites, and nothing else. Edit the defaults, or set the variables before sbatch.

# Read by sbatch itself: `source launch_slurm/env.sh` before it, or give --partition and --account to sbatch.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project

# module load cuda/13.0

# The repository, and a Python that has it installed (`make setup`), at the same place on every node.
export RCM_ROOT="${RCM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
export RCM_PYTHON="${RCM_PYTHON:-$RCM_ROOT/.venv/bin/python}"

# Processes of each node: its GPUs.
export RCM_RANKS_PER_NODE="${RCM_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"

# Times that torchrun starts the ranks again within a job when one fails, before the job is requeued.
export RCM_MAX_RESTARTS="${RCM_MAX_RESTARTS:-0}"

# Address of the first node and a port, where node names do not resolve or ports are restricted.
export RCM_HEAD_ADDRESS="${RCM_HEAD_ADDRESS:-}"
export RCM_HEAD_PORT="${RCM_HEAD_PORT:-}"

# A container by pyxis and enroot: image (.sqsh, or registry#name) and mounts; RCM_PYTHON is then a path inside it.
export RCM_CONTAINER_IMAGE="${RCM_CONTAINER_IMAGE:-}"
export RCM_CONTAINER_MOUNTS="${RCM_CONTAINER_MOUNTS:-$RCM_ROOT:$RCM_ROOT,/data:/data}"

# Of NCCL, where the site's documentation asks for it.
# export NCCL_SOCKET_IFNAME=ib0

#!/usr/bin/env bash
# rCM of Wan2.1 14B, from the repository's root: sbatch launch_slurm/rcm_14b.sh [section.field=value ...] (docs/slurm.md)
#SBATCH --job-name=rcm_14b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
source "${RCM_ROOT:-$SLURM_SUBMIT_DIR}/launch_slurm/env.sh"
source "$RCM_ROOT/launch_slurm/launch.sh"
train "${RCM_CONFIG:-$RCM_ROOT/examples/wan_14b/config.yaml}" "$@"

#!/usr/bin/env bash
# Samples of a checkpoint, from the repository's root: sbatch launch_slurm/sample.sh --checkpoint RUN --prompts FILE --out FOLDER ...
# (the arguments of `python -m rcm_mcore.sample`). Submitted again, it goes on with what is missing.
#SBATCH --job-name=rcm_sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
source "${RCM_ROOT:-$SLURM_SUBMIT_DIR}/launch_slurm/env.sh"
source "$RCM_ROOT/launch_slurm/launch.sh"
torchrun -m rcm_mcore.sample "$@"

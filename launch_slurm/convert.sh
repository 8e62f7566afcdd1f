#!/usr/bin/env bash
# A checkpoint in another format, from the repository's root: sbatch launch_slurm/convert.sh --from FORMAT --to FORMAT SRC DST ...
# (the arguments of tools/convert_checkpoint.py). Needs no GPU.
#SBATCH --job-name=rcm_convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
source "${RCM_ROOT:-$SLURM_SUBMIT_DIR}/launch_slurm/env.sh"
source "$RCM_ROOT/launch_slurm/launch.sh"
on_nodes 1 "$RCM_PYTHON" "$RCM_ROOT/tools/convert_checkpoint.py" "$@"

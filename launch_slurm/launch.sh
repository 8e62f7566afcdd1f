# shellcheck shell=bash
# What the scripts of this folder share; they source it after env.sh.

export PYTHONSAFEPATH=1  # the repository's root holds a folder named kernels, which Hugging Face packages probe for
# Preemption sends SIGTERM to every process of the job. torchrun would end its workers 30 s later; they save and end by themselves.
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT

# Ranks that torchrun starts again need a store of their own (docs/faults.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# on_nodes N COMMAND...: one task on each of N nodes, in the container if there is one.
on_nodes() {
  local nodes=$1 container=()
  shift
  if [[ -n $RCM_CONTAINER_IMAGE ]]; then
    container=(--container-image="$RCM_CONTAINER_IMAGE" --container-mounts="$RCM_CONTAINER_MOUNTS" --container-workdir="$PWD")
  fi
  # What ignores a signal starts its children ignoring it: of all processes only the trainer's, which set handlers, take note.
  # shellcheck disable=SC2016
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "${container[@]}" \
    bash -c 'trap "" USR1 TERM; exec "$@"' bash "$@"
}

# torchrun ARGUMENT...: on every node of the job.
torchrun() {
  local head=${RCM_HEAD_ADDRESS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  local port=${RCM_HEAD_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  on_nodes "$SLURM_JOB_NUM_NODES" "$RCM_PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RCM_RANKS_PER_NODE" --max-restarts="$RCM_MAX_RESTARTS" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
}

# train CONFIG [section.field=value ...]: until the run is finished, stopped or failed; then requeue the job if that may help.
train() {
  local code=0 verdict=0
  torchrun -m rcm_mcore.train "$@" || code=$?
  on_nodes 1 "$RCM_PYTHON" -m rcm_mcore.requeue --exit-code "$code" "$@" || verdict=$?
  if [[ $verdict == 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # ends this script
  fi
  exit "$verdict"
}

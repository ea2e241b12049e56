#!/usr/bin/env bash
# A run of the study, or any script here, from the repository; without Slurm with `bash` in the place of `sbatch`.
#
#   sbatch job.sh [CNN_LR LC_LR EPOCHS N_SPLITS] [-- FLAGS OF EXPERIMENTS.PY]
#   sbatch job.sh SCRIPT.py [ARGUMENTS]
#
# Ahead of its time limit a job saves and requeues itself. Flags of sbatch override these; see docs/cluster.md.
#SBATCH --job-name=rnorm
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# shellcheck disable=SC1091
file=$(realpath "$0") && cd "$(dirname "$file")" || exit
[ -e experiments.py ] || cd "$SLURM_SUBMIT_DIR" || exit # Slurm runs a copy of this file, made elsewhere
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
[ ! -e job.env ] || source ./job.env
set -euo pipefail
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

if [[ ${1:-} == *.py ]]; then
  command=(python -u "$@")
  [[ $1 != convert.py || -z ${SLURM_ARRAY_TASK_ID:-} ]] || command+=(--split "$SLURM_ARRAY_TASK_ID")
else
  command=(python -u experiments.py)
  for flag in --cnn_lr --lc_lr --epochs --n_splits; do
    [[ $# == 0 || $1 == -* ]] || { command+=("$flag" "$1"); shift; }
  done
  [[ $# == 0 || $1 == -- ]] || { sed -n '2,5s/^# \?//p' job.sh >&2; exit 2; }
  for word in "${@:2}"; do # --fresh is for the first start alone
    [[ $word == --fresh && ${SLURM_RESTART_COUNT:-0} != 0 ]] || command+=("$word")
  done
fi
if [[ -n ${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-} && ${command[2]} =~ ^(experiments|convert|interpolate)\.py$ ]]; then
  [[ ${command[*]} == *" --device"* ]] || command+=(--device cuda) # if it cannot be used, the job fails
fi
echo "$(date '+%Y-%m-%d %H:%M:%S') on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}: ${command[*]}"
[ ! "$file" -ef job.sh ] || exec "${command[@]}" # not a job of sbatch: signals come to Python itself

cancelled='' status=0
trap 'kill -INT $! || true' INT
trap 'kill -TERM $! || true; cancelled=yes' TERM
trap 'kill -USR1 $! || true' USR1
"${command[@]}" &
while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal cuts `wait` short
wait $! || status=$?
[ $status != 75 ] || [ -n "$cancelled" ] || scontrol requeue "$SLURM_JOB_ID" # saved after USR1
exit $status

#!/usr/bin/env bash
# A run of the study, or any script here, from the repository; without Slurm with `bash` in the place of `sbatch`.
#
#   sbatch job.sh [CNN_LR LC_LR EPOCHS N_SPLITS] [-- FLAGS OF EXPERIMENTS.PY]
#   sbatch job.sh SCRIPT.py [ARGUMENTS]
#
# Ahead of its time limit a job saves and requeues itself. Flags of sbatch override these; see docs/cluster.md.
#SBATCH --job-name=rnorm
#SBATCH --output=logs/%j.log
#SBATCH --open-mode=append
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# shellcheck disable=SC1091
cd "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")" || exit # macOS before 13 has no realpath
in_slurm=''
[ -e experiments.py ] || { in_slurm=yes; cd "${SLURM_SUBMIT_DIR:-.}" || exit; } # Slurm runs a copy, made elsewhere
[ -e experiments.py ] || { echo "job.sh: $PWD is not the repository; submit it from there" >&2; exit 2; }
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -e .venv/bin/activate ]; then
  source .venv/bin/activate
fi
[ ! -e job.env ] || source ./job.env
set -euo pipefail # bash 3.2 and 4.2 have to read all this; there an empty array counts as unset
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

if [[ ${1:-} == *.py ]]; then
  command=(python -u "$@")
  [[ $1 != convert.py || -z ${SLURM_ARRAY_TASK_ID:-} ]] || command+=(--split "$SLURM_ARRAY_TASK_ID")
else
  command=(python -u experiments.py)
  for flag in --cnn_lr --lc_lr --epochs --n_splits; do
    [[ $# == 0 || $1 == -* ]] || { command+=("$flag" "$1"); shift; }
  done
  [[ $# == 0 || $1 == -- ]] || { sed -n '2,5s/^# *//p' job.sh >&2; exit 2; }
  [ $# = 0 ] || shift
  command+=("$@")
fi
echo "$(date '+%Y-%m-%d %H:%M:%S') on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}: ${command[*]}"
[ -n "$in_slurm" ] || exec "${command[@]}" # signals come to Python itself

cancelled='' status=0
trap 'kill -INT $! || true' INT
trap 'kill -TERM $! || true; cancelled=yes' TERM
trap 'kill -USR1 $! || true' USR1
"${command[@]}" &
while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal cuts `wait` short
wait $! || status=$?
if [ $status = 75 ] && [ -z "$cancelled" ]; then # saved after USR1
  job=$SLURM_JOB_ID # the whole array's, in one of its tasks
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  scontrol requeue "$job" || echo "job.sh: saved, but not requeued; submit the same command again to continue" >&2
fi
exit $status

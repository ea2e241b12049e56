#!/usr/bin/env bash
# One configuration of the study, under Slurm or without it:
#
#   sbatch job.sh [CNN_LR LC_LR EPOCHS N_SPLITS] [-- EXPERIMENTS.PY FLAGS]
#   bash   job.sh [CNN_LR LC_LR EPOCHS N_SPLITS] [-- EXPERIMENTS.PY FLAGS]
#   sbatch job.sh SCRIPT.py [ARGUMENTS]      any script of this repository, in the same environment
#
# What is left out is as in experiments.py, but a job to which Slurm gave a GPU runs with --device cuda. Submit from
# the repository; the log is logs/NAME-JOB.log. Python is that of .venv if there is one; job.env, if there is one, is
# sourced after it: the place for a site's modules. More in docs/cluster.md.
#
# Ahead of the time limit, or of a pre-emption that sends USR1, the run is saved and the job requeues itself, unless
# it made no progress since it last started. Flags of sbatch, or its variables (SBATCH_ACCOUNT, SBATCH_PARTITION,
# SBATCH_GRES=gpu:a100:1, SBATCH_TIMELIMIT, ...), go before these defaults:
#SBATCH --job-name=rnorm
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

# Slurm runs a copy of this file, made elsewhere.
here=$(dirname "$(realpath "$0")")
spooled=
[ -e "$here/experiments.py" ] || { here=${SLURM_SUBMIT_DIR:-$here} spooled=yes; }
[ -e "$here/experiments.py" ] || { echo "job.sh: no experiments.py in $here; submit from the repository" >&2; exit 2; }
cd "$here" || exit

child='' signal=''
# shellcheck disable=SC2317,SC2329 # traps call it
forward() { # a signal, to Python, which saves and ends
  signal=$1
  [ -z "$child" ] || kill -s "$signal" "$child" 2>/dev/null || true
}
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'forward USR1' USR1

# shellcheck disable=SC1091
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
# shellcheck disable=SC1091
[ ! -e job.env ] || source ./job.env
set -euo pipefail
export PYTHONUNBUFFERED=1
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"

script=experiments.py arguments=()
if [[ ${1:-} == *.py ]]; then
  script=$1 arguments=("${@:2}")
else
  for flag in --cnn_lr --lc_lr --epochs --n_splits; do
    [[ $# -gt 0 && $1 != -* ]] || break
    arguments+=("$flag" "$1")
    shift
  done
  [[ $# -eq 0 || $1 == -- ]] || { sed -n '2,6s/^# \?//p' job.sh >&2; exit 2; }
  arguments+=("${@:2}")
fi

# With a GPU from Slurm, ask for it outright: a GPU that does not work ends the job, rather than train on the CPU.
if [[ -n ${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-} && $script =~ ^(experiments|convert)\.py$ ]]; then
  [[ " ${arguments[*]}" == *" --device"* ]] || arguments+=(--device cuda)
fi

split=
case $script in
  experiments.py)
    for i in "${!arguments[@]}"; do # --fresh is for the first start alone
      [[ ${arguments[i]} != --fresh ]] || ((${SLURM_RESTART_COUNT:-0} == 0)) || unset "arguments[$i]"
    done
    ;;
  convert.py) # in an array, a split per task
    split=${SLURM_ARRAY_TASK_ID:-}
    [ -z "$split" ] || arguments+=(--split "$split")
    ;;
  plot.py) # a job that failed early leaves nothing to draw
    for i in "${!arguments[@]}"; do
      [[ ${arguments[i]} != */epochs=* || -e ${arguments[i]}/evaluation-history.hist ]] || {
        echo "left out, as it has recorded nothing: ${arguments[i]}"
        unset "arguments[$i]"
      }
    done
    ;;
esac

# The run's directory, and how far the work in it has come. Every stop writes latest.pyT anew, but the same bytes.
run=${arguments[0]:-}
if [ "$script" = experiments.py ]; then
  plan=$(python experiments.py "${arguments[@]}" --exec 0) || exit
  run=$(sed -n 's/^run  *//p' <<<"$plan")
  [ -n "$run" ] || { echo "$plan" && exit; } # --help
fi
progress() (
  [ -d "$run" ] && cd "$run" || exit 0
  files="*${split:+_$split/}*.pyT"
  { find . -path "$files" && find . -path "$files" -name latest.pyT -exec cksum {} +; } | sort | cksum
)
before=$(progress)

echo "$(date '+%Y-%m-%d %H:%M:%S') on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}: python $script ${arguments[*]}"
[ -z "$signal" ] || { echo "job.sh: SIG$signal before the start" >&2 && exit $((128 + $(kill -l "$signal"))); }
python "$script" "${arguments[@]}" &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal cuts `wait` short
status=0
wait "$child" || status=$?

if ((status == 75)) && [ -n "$spooled" ] && [ "$signal" != TERM ]; then # 75: stopped by USR1 and saved (rnorm/cli.py)
  if [ "$(progress)" != "$before" ]; then
    echo "job.sh: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "job.sh: no progress since this start, so the job is not requeued; give it more time (sbatch --time)" >&2
  fi
fi
exit "$status"

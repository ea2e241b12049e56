#!/usr/bin/env bash
# The grid of the study on a Slurm cluster, one job per configuration, and a last job that draws figure and table:
#
#   ./run_all.sh [--cnn_lr LR ...] [--lc_lr LR ...] [--seed N ...] [--epochs N ...] [--n_splits N ...]
#                [--dry-run | --local] [--split-jobs [LIMIT]] [-- EXPERIMENTS.PY FLAGS]
#
#   --dry-run      print what would be submitted, or with --local run
#   --local        run everything on this machine, one after another
#   --split-jobs   for each configuration one job for the CNN and then one per split, at most LIMIT (4) at once
#
# The default is cnn_lr 0.1 0.05, lc_lr 0.01 0.005, seed 0, 150 epochs, 20 splits. Configurations that are complete, or
# in Slurm's queue already, are not submitted again. See job.sh for account, partition, GPU type and environment.
cd "$(dirname "$(realpath "$0")")" || exit
# shellcheck disable=SC1091
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
# shellcheck disable=SC1091
[ ! -e job.env ] || source ./job.env
set -euo pipefail
die() { echo "run_all.sh: $1" >&2 && exit "${2:-2}"; }

grid=() dry_run='' where=slurm limit='' # LIMIT is empty without --split-jobs
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    -h | --help) sed -n '2,12s/^# \?//p' run_all.sh && exit ;;
    --dry-run) dry_run=yes ;;
    --local) where=here ;;
    --split-jobs) limit=4 && [[ ${2:--} == -* ]] || { limit=$2 && shift; } ;;
    *) grid+=("$1") ;;
  esac
  shift
done
[ $# = 0 ] || shift
[[ $limit =~ ^([1-9][0-9]*)?$ ]] || die "--split-jobs $limit: LIMIT has to be a positive number"
[ $where = slurm ] || [ -z "$limit" ] || die "--split-jobs needs Slurm"

queue='' # per line a job's number and the path of its run
[ $where = here ] || queue=$(squeue --noheader --user="$(id -un)" --format='%F %k') || {
  [ -n "$dry_run" ] || die "no answer from Slurm; go where there is one, or use --local to run everything here" 1
  echo "run_all.sh: no answer from Slurm; this is the plan if nothing is queued" >&2
}

# Whatever is wrong is refused here: the settings of each configuration, the other flags with the first one.
plan=$(python -m rnorm.grid "${grid[@]}" -- "$@") || exit
IFS=$'\t' read -r _ run _ _ cnn_lr lc_lr epochs n_splits seed _ <<<"$plan"
first=(--cnn_lr "$cnn_lr" --lc_lr "$lc_lr" --epochs "$epochs" --n_splits "$n_splits" --seed "$seed" "$@")
python experiments.py "${first[@]}" --exec 0 >/dev/null || exit
results=$(dirname "$run")

ids=() runs=() worst=0 submitted=0
submit() { # submit WHAT SBATCH_ARGUMENTS...; the job's number becomes `id`
  submitted=$((submitted + 1))
  if [ -n "$dry_run" ]; then
    id=ID$submitted
    printf '%q ' sbatch "${@:2}" && echo "# $id"
  else
    id=$(sbatch --parsable "${@:2}")
    id=${id%%;*} # without the cluster's name
    echo "job $id: $1"
  fi
  ids+=("$id")
}
run_here() { # job.sh with these arguments, on this machine; ends the script if a signal ended it
  local status=0
  if [ -n "$dry_run" ]; then
    printf '%q ' bash job.sh "$@" && echo
    return
  fi
  bash job.sh "$@" </dev/null &
  # shellcheck disable=SC2064
  trap "kill -TERM $! 2>/dev/null" INT TERM
  while kill -0 $! 2>/dev/null; do wait $! || true; done
  wait $! || status=$?
  trap - INT TERM
  case $status in 130 | 143) exit $status ;; esac
  ((status <= worst)) || worst=$status
}

while IFS=$'\t' read -r state run path splits cnn_lr lc_lr epochs n_splits seed convert_flags; do
  runs+=("$run")
  arguments=("$cnn_lr" "$lc_lr" "$epochs" "$n_splits" -- --seed "$seed" "$@")
  name=("--job-name=$(basename "$run")" "--comment=$path")
  mapfile -t queued < <(while read -r job of; do [ "$of" != "$path" ] || echo "$job"; done <<<"$queue" | sort -u)
  if [ "$state" = complete ]; then
    echo "complete: $run"
  elif [ ${#queued[@]} -gt 0 ]; then
    echo "queued already, as job ${queued[*]}: $run"
    ids+=("${queued[@]}")
  elif [ $where = here ]; then
    run_here "${arguments[@]}"
  elif [ -z "$limit" ] || [ "$splits" = - ]; then
    submit "$run" "${name[@]}" job.sh "${arguments[@]}"
  else
    IFS=$'\t' read -r -a flags <<<"$convert_flags"
    submit "the CNN of $run" "${name[@]}" job.sh "${arguments[@]}" --cnn_only
    submit "its converted networks, from $splits" "${name[@]}" --array="$splits%$limit" --output=logs/%x-%A_%a.log \
      --dependency="afterok:$id" --kill-on-invalid-dep=yes job.sh convert.py "$run" "${flags[@]}"
  fi
done <<<"$plan"

plot=(plot.py "${runs[@]}" --out "$results/figure.png" --table "$results/table.md")
if [ $where = here ]; then
  run_here "${plot[@]}"
  exit $worst
fi
if [ $submitted = 0 ] && [ ${#ids[@]} -gt 0 ]; then
  echo "nothing to submit"
else
  after=()
  [ ${#ids[@]} = 0 ] || after=("--dependency=afterany:$(IFS=: && echo "${ids[*]}")")
  submit "$results/figure.png and table.md, once the others have ended" --job-name=rnorm-plot "${after[@]}" \
    --gres=none --cpus-per-task=1 --mem=4G --time=30 job.sh "${plot[@]}"
fi
[ -n "$dry_run" ] || echo "
watch:   squeue --jobs=$(IFS=, && echo "${ids[*]}")
         tail -f logs/*-${ids[0]}.log
cancel:  scancel ${ids[*]}"

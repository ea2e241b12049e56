#!/usr/bin/env bash
# The grid of the study, one job per run. CNN_LR, LC_LR, SEED, EPOCHS and N_SPLITS are taken from the environment:
#   SEED="0 1 2" EPOCHS=50 ./run_all.sh [--dry-run] [-- FLAGS OF EXPERIMENTS.PY]
# --dry-run prints the jobs. The same command may be repeated: complete runs are left out, and jobs of one run wait for
# each other. Without Slurm the runs follow one another on this machine. See docs/cluster.md.
# shellcheck disable=SC1091
cd "$(dirname "$(realpath "$0")")" || exit
[ ! -e job.env ] || source ./job.env
set -euo pipefail
: "${CNN_LR:=0.1 0.05}" "${LC_LR:=0.01 0.005}" "${SEED:=0}" "${EPOCHS:=150}" "${N_SPLITS:=20}"

dry_run='' jobs=() status=0
[[ ${1:-} != @(-h|--help) ]] || { sed -n '2,5s/^# \?//p' run_all.sh; exit; }
[[ ${1:-} != --dry-run ]] || { dry_run=yes; shift; }
[[ ${1:-} != -- ]] || shift
for cnn_lr in $CNN_LR; do
  for lc_lr in $LC_LR; do
    for seed in $SEED; do
      job=(job.sh "$cnn_lr" "$lc_lr" "$EPOCHS" "$N_SPLITS" -- --seed "$seed" "$@")
      plan=$(bash "${job[@]}" --exec 0) || exit # whatever is wrong is refused here
      run=$(sed -n 's/^run  *//p' <<<"$plan")
      state=$(sed -n 's/^state  *//p' <<<"$plan")
      echo "${run:?experiments.py printed no plan}: $state"
      start=(bash)
      ! command -v sbatch >/dev/null || start=(sbatch "--job-name=$(basename "$run")" --dependency=singleton)
      [[ $state == complete && " $* " != *" --fresh "* ]] || jobs+=("$(printf '%q ' "${start[@]}" "${job[@]}")")
    done
  done
done

for job in "${jobs[@]}"; do
  echo "$job"
  [ -z "$dry_run" ] || continue
  trap 'kill -TERM $! 2>/dev/null || exit 143; wait $!; exit $?' INT TERM
  eval "$job &" # in the background, so that the trap does not wait for its end
  wait $! || status=$?
done
exit $status

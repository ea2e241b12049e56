#!/usr/bin/env bash
# The grid of the study, one job per run. CNN_LR, LC_LR, SEED, EPOCHS and N_SPLITS are taken from the environment:
#   SEED="0 1 2" EPOCHS=50 ./run_all.sh [--dry-run] [--here] [-- FLAGS OF EXPERIMENTS.PY]
# --dry-run prints the jobs, and what disk space and time they take. --here: on this machine, although it has Slurm.
# The same command may be repeated: complete runs are left out, and jobs of one run wait for each other. Without Slurm
# the runs follow one another on this machine. See docs/cluster.md.
# shellcheck disable=SC1091
cd "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")" || exit # macOS before 13 has no realpath
[ ! -e job.env ] || source ./job.env
set -euo pipefail # bash 3.2 and 4.2 have to read all this; there an empty array counts as unset
: "${CNN_LR:=0.1 0.05}" "${LC_LR:=0.01 0.005}" "${SEED:=0}" "${EPOCHS:=150}" "${N_SPLITS:=20}"

amount() { # BYTES SECONDS, as text; the seconds are `null` where they are not known
  printf '%d.%02d GB' $(($1 / 1000000000)) $(($1 / 10000000 % 100))
  [ "$2" = null ] || printf ', about %d h %02d min on this machine' $(($2 / 3600)) $(($2 / 60 % 60))
}

dry_run='' slurm='' jobs=() status=0 all_bytes=0 all_seconds=0
! command -v sbatch >/dev/null || slurm=yes
while [ $# != 0 ]; do
  case $1 in
    -h | --help) sed -n '2,6s/^# *//p' run_all.sh; exit ;;
    --dry-run) dry_run=yes ;;
    --here) slurm='' ;;
    --) shift; break ;;
    *) break ;;
  esac
  shift
done

for cnn_lr in $CNN_LR; do
  for lc_lr in $LC_LR; do
    for seed in $SEED; do
      job=(job.sh "$cnn_lr" "$lc_lr" "$EPOCHS" "$N_SPLITS" -- --seed "$seed" "$@")
      plan=$(bash "${job[@]}" --exec 0) || exit # whatever is wrong is refused here
      plan=${plan##*$'\n'} # plan: {"run": "...", "state": "...", "bytes": ..., "seconds": ...}
      [[ $plan == 'plan: {"run": "'*'", "state": "'*'", "bytes": '*', "seconds": '*'}' ]] ||
        { echo "run_all.sh: experiments.py printed no plan" >&2; exit 1; }
      run=${plan#*\"run\": \"} run=${run%\", \"state\": \"*} # a quotation mark in a name has a backslash before it
      state=${plan##*\", \"state\": \"} state=${state%%\"*}
      bytes=${plan##*\"bytes\": } bytes=${bytes%%,*}
      seconds=${plan##*\"seconds\": } seconds=${seconds%\}}
      if [ "$state" = complete ]; then
        echo "$run: complete"
        continue
      fi
      echo "$run: $state, $(amount "$bytes" "$seconds")"
      all_bytes=$((all_bytes + bytes))
      [ "$seconds" != null ] || all_seconds=null
      [ "$all_seconds" = null ] || all_seconds=$((all_seconds + seconds))
      start=(bash)
      [ -z "$slurm" ] || start=(sbatch "--job-name=${run##*/}" --dependency=singleton)
      jobs+=("$(printf '%q ' "${start[@]}" "${job[@]}")")
    done
  done
done
[ -z "${jobs[*]+x}" ] || echo "in all: $(amount $all_bytes $all_seconds)"

for job in ${jobs[@]+"${jobs[@]}"}; do
  echo "$job"
  [ -z "$dry_run" ] || continue
  trap 'kill -TERM $! 2>/dev/null || exit 143; wait $!; exit $?' INT TERM HUP
  eval "$job &" # in the background, so that the trap does not wait for its end
  wait $! || status=$?
  if [ -n "$slurm" ] && [ $status != 0 ]; then
    echo "run_all.sh: sbatch failed, so no more is submitted. If \`sinfo\` fails, too, no Slurm answers here;" \
      "with --here the runs follow one another on this machine" >&2
    exit 1
  fi
done
exit $status

#!/usr/bin/env bash
# The grid of the study on a Slurm cluster, one job per configuration, and a last job that draws figure and table:
#
#   ./run_all.sh [--cnn_lr LR ...] [--lc_lr LR ...] [--seed N ...] [--epochs N ...] [--n_splits N ...]
#                [--dry-run | --local] [--split-jobs [LIMIT]] [-- EXPERIMENTS.PY FLAGS]
#
#   --dry-run      print what would be submitted, or with --local run
#   --local        run everything on this machine, one after another
#   --split-jobs   for each configuration one job for the CNN and then one per eLCN, at most LIMIT (4) at once
#
# The default is cnn_lr 0.1 0.05, lc_lr 0.01 0.005, seed 0, 150 epochs, 20 splits. Configurations that are complete, or
# in Slurm's queue already, are not submitted again. See job.sh for account, partition, GPU type and environment.
cd "$(dirname "$(realpath "$0")")" || exit
# shellcheck disable=SC1091
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
# shellcheck disable=SC1091
[ ! -e job.env ] || source ./job.env
set -euo pipefail

help() { sed -n '2,12s/^# \?//p' run_all.sh; }
usage() {
  { help && echo "run_all.sh: $*"; } >&2
  exit 2
}

grid=() dry_run='' where=slurm limit=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  option=$1 values=()
  while [[ $# -gt 1 && $2 != -* ]]; do values+=("$2") && shift; done
  shift
  case $option in
    -h | --help) help && exit ;;
    --cnn_lr | --lc_lr | --seed | --epochs | --n_splits)
      [ ${#values[@]} -gt 0 ] || usage "$option needs a value"
      grid+=("${option#--}=${values[*]}")
      continue
      ;;
    --split-jobs)
      limit=${values[0]:-4} values=("${values[@]:1}")
      [[ $limit =~ ^[1-9][0-9]*$ ]] || usage "--split-jobs $limit: LIMIT has to be a positive number"
      ;;
    --dry-run) dry_run=yes ;;
    --local) where=here ;;
    *) usage "$option: no such option; flags of experiments.py go after --" ;;
  esac
  [ ${#values[@]} = 0 ] || usage "${values[0]}: what is it?"
done
[ $# = 0 ] || shift
[ $where = slurm ] || [ -z "$limit" ] || usage "--split-jobs needs Slurm"
if [ "$where$dry_run" = slurm ] && ! command -v sbatch >/dev/null; then
  echo "run_all.sh: no sbatch here; run it where Slurm is, or --local to run everything on this machine" >&2
  exit 1
fi

# Per configuration a line of fields separated by tabs; anything wrong ends the script here.
plan=$(
  python - "${grid[@]}" -- "$@" <<'END'
import itertools
import sys

from cli import Stop
from experiments import parse
from runs import Settings, checkpoint_path, label, read_status

sys.argv[0] = "run_all.sh"
end = sys.argv.index("--")
grid = {"cnn_lr": "0.1 0.05", "lc_lr": "0.01 0.005"}
grid |= {name: str(getattr(Settings, name)) for name in ("epochs", "n_splits", "seed")}
grid |= (word.split("=", 1) for word in sys.argv[1:end])
lines = {}
for values in itertools.product(*(words.split() for words in grid.values())):
    try:
        args, settings = parse([f"--{name}={value}" for name, value in zip(grid, values)] + sys.argv[end + 1 :])
    except Stop as stop:
        sys.exit(print(f"run_all.sh: {stop}", file=sys.stderr) or 2)
    except SystemExit:  # --help
        sys.exit(2)
    run = args.results_dir / settings.run_name
    networks = read_status(run)["networks"]
    diverged = "diverged_at" in networks.get(label(None), {})  # then there are no splits past that
    splits = [] if args.cnn_only else settings.split_epochs
    due = [None, *(split for split in splits if not diverged or checkpoint_path(run, None, split).exists())]
    ended = all(networks.get(label(split), {}).get("state") in ("complete", "diverged") for split in due)
    lines[run] = (
        "complete" if ended and not args.fresh else "new", run, run.absolute(),
        ",".join(map(str, settings.split_epochs)), args.data_dir, args.device, args.keep, *values,
    )  # fmt: skip
for line in lines.values():
    print(*line, sep="\t")
END
) || exit
IFS=$'\t' read -r _ run _ <<<"$plan"
results=$(dirname "$run")

ids=() runs=() worst=0 submitted=0
submit() { # submit WHAT SBATCH_ARGUMENTS...; the job's id becomes `id`
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
  bash job.sh "$@" &
  # shellcheck disable=SC2064
  trap "kill -TERM $! 2>/dev/null" INT TERM
  while kill -0 $! 2>/dev/null; do wait $! || true; done
  wait $! || status=$?
  trap - INT TERM
  case $status in 130 | 143) exit $status ;; esac
  ((status <= worst)) || worst=$status
}

queue=
[ $where = here ] || ! command -v squeue >/dev/null || queue=$(squeue --noheader --user="$(id -un)" --format='%F %k')
mkdir -p logs
while IFS=$'\t' read -r state run path splits data_dir device keep cnn_lr lc_lr epochs n_splits seed; do
  runs+=("$run")
  words=("$cnn_lr" "$lc_lr" "$epochs" "$n_splits" -- --seed "$seed" "$@")
  name=("--job-name=$(basename "$run")" "--comment=$path")
  mapfile -t queued < <(awk -v path="$path" '{ id = $1; sub(/^[^ ]+ /, "") } $0 == path { print id }' <<<"$queue" | sort -u)
  if [ "$state" = complete ]; then
    echo "complete: $run"
  elif [ ${#queued[@]} -gt 0 ]; then
    echo "queued already, as job ${queued[*]}: $run"
    ids+=("${queued[@]}")
  elif [ $where = here ]; then
    run_here "${words[@]}" </dev/null
  elif [ -z "$limit" ]; then
    submit "$run" "${name[@]}" job.sh "${words[@]}"
  else
    submit "the CNN of $run" "${name[@]}" job.sh "${words[@]}" --cnn_only
    submit "its eLCNs, from $splits" "${name[@]}" --array="$splits%$limit" --output=logs/%x-%A_%a.log \
      --dependency="afterok:$id" --kill-on-invalid-dep=yes \
      job.sh convert.py "$run" --data_dir "$data_dir" --device "$device" --keep "$keep"
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

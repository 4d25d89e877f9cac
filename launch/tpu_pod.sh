#!/usr/bin/env bash
# A run on a Cloud TPU slice: requests the slice, trains on all its hosts, and requests another one
# when it is taken away. https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/tpu_pod.sh COMMAND NAME [options] [-- flags of psp_jax.main]

commands:
  create   request the slice and wait until it is there
  run      create the slice if it does not exist, install psp_jax on it and train. Starts again
           after each preemption until the run is finished. Follows a run that is already running.
  status   print the request, the slice, and the last lines of each host's log
  logs     follow the log of a host
  delete   stop the run with SIGTERM, which saves a checkpoint, and give the slice back. First end
           `run` with Ctrl-C: it would request the slice again.

options:
  --zone ZONE       such as us-west4-a (default: the variable ZONE)
  --type TYPE       type of the slice: v5litepod-16 (default), v6e-8, v5p-8, v4-8, ...
  --runtime NAME    software of the hosts (default: the one for the type)
  --on-demand       pay the full price for a slice that is not taken away (default: spot)
  --worker N        for logs: the number of the host (default: 0)
  --delete-at-end   for run: delete the slice when the run ends by itself
  --dry-run         print the commands and run none

environment:
  CLOUDSDK_CORE_PROJECT   the project (default: gcloud's)
  POLL=30                 seconds between looks at a slice that is not there yet
  RETRY_AFTER=600         a run that crashes within this many seconds is not started again
  MAX_CRASHES=50          a run that has crashed this often is not started again

A preempted run continues on a new slice: --workdir and the data must be on a bucket (gs://...).
Config files must be in configs/, which is copied to the hosts together with psp_jax/.

exit code of run: 0 finished; 2 an error that you can correct; 130 Ctrl-C (the slice goes on
training); otherwise that of psp_jax.main.

example:
  launch/tpu_pod.sh run r50 --zone us-west4-a --type v5litepod-16 -- \
      --config configs/ade20k.py:source=tfds --config.data.root=gs://bucket/tfds \
      --workdir gs://bucket/runs/r50
END
}

say() { echo "tpu_pod.sh: $*" >&2; }

fail() {
    say "error: $* (see --help)"
    exit 2
}

# ---- Flags
command='' name='' zone=${ZONE-} type=v5litepod-16 runtime='' spot=--spot worker=0
delete_at_end='' dry_run='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --zone | --type | --runtime | --worker)
        [ $# -gt 1 ] || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
    --zone=* | --type=* | --runtime=* | --worker=*)
        option=${1%%=*}
        printf -v "${option#--}" '%s' "${1#*=}"
        ;;
    --on-demand) spot='' ;;
    --delete-at-end) delete_at_end=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
        usage
        exit 0
        ;;
    --)
        shift
        flags=("$@")
        break
        ;;
    -*) fail "flag $1 is unknown; flags of psp_jax.main come after --" ;;
    *)
        if [ -z "$command" ]; then
            command=$1
        elif [ -z "$name" ]; then
            name=$1
        else
            fail "'$1' belongs to no flag"
        fi
        ;;
    esac
    shift
done
case $command in
create | run | status | logs | delete) ;;
*) fail "COMMAND=$command: must be create, run, status, logs or delete" ;;
esac
[ -n "$name" ] || fail 'NAME, the name of the slice, is missing'
[ -n "$zone" ] || fail '--zone is missing'
if [ -z "$runtime" ]; then # https://cloud.google.com/tpu/docs/runtimes
    case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type=$type: give the --runtime of this type too" ;;
    esac
fi
poll=${POLL:-30} retry_after=${RETRY_AFTER:-600} max_crashes=${MAX_CRASHES:-50}

# ---- Commands of gcloud, each printed first
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

show() { # prints a command as a shell takes it; words of several lines stay readable
    local word
    printf '+' >&2
    for word in "$@"; do
        case $word in
        *\'*) printf ' %q' "$word" >&2 ;;
        *$'\n'*) printf " '%s'" "$word" >&2 ;;
        *) printf ' %q' "$word" >&2 ;;
        esac
    done
    echo >&2
}

run() {
    show "$@"
    [ -n "$dry_run" ] || "$@"
}

tpu() { # kind, verb, other words
    local kind=$1 verb=$2
    shift 2
    run gcloud compute tpus "$kind" "$verb" "$name" --zone "$zone" "$@"
}

on_host() { # a number or all; command
    tpu tpu-vm ssh --quiet --worker="$1" --command="$2"
}

field() { # kind, field: prints its value; nothing if the thing does not exist
    tpu "$1" describe --format="value($2)" 2>"$scratch/errors" || {
        grep -qiE 'not[ _]found' "$scratch/errors" || echo UNKNOWN # gcloud failed: look again later
    }
}

find_state() { # sets `state` to NONE, WAITING, READY, GONE or FAILED, and `why`
    why=$(field queued-resources state.state)
    case $why in
    '') state=NONE ;;
    SUSPENDED) state=GONE ;;
    FAILED) state=FAILED ;;
    ACTIVE)
        why=$(field tpu-vm state)
        case $why in
        READY) state=READY ;;
        '' | PREEMPTED | TERMINATED | STOPPED) state=GONE ;;
        *) state=WAITING ;;
        esac
        ;;
    *) state=WAITING ;;
    esac
}

create() {
    say "requesting $name: $type in $zone, ${spot:-on demand}"
    tpu queued-resources create --node-id "$name" --accelerator-type "$type" \
        --runtime-version "$runtime" ${spot:+"$spot"}
}

delete() { tpu queued-resources delete --force --quiet; }

was_ready='' is_new=''
wait_until_ready() { # sets `is_new` if the slice was not there at once
    if [ -n "$dry_run" ]; then
        create
        return
    fi
    local before=''
    while true; do
        find_state
        [ "$before" = "$state$why" ] || say "$name is $state${why:+ ($why)}"
        before=$state$why
        case $state in
        READY)
            was_ready=1
            return
            ;;
        FAILED)
            say "error: the request failed. Delete it, then try another --type or --zone"
            exit 1
            ;;
        NONE) create || [ -n "$was_ready" ] || exit 1 ;; # later refusals are often temporary
        GONE) delete || say 'deleting failed; trying again' ;;
        esac
        is_new=1
        sleep "$poll"
    done
}

# ---- Commands that run on the hosts. A lost connection ends neither the run nor its log: the next
# connection (gcloud itself tries ten times) follows the process that is running.
# shellcheck disable=SC2016  # the hosts' shell expands these
ON_HOST_INSTALL='set -e
process=$(cat psp_jax/run.process 2>/dev/null || echo none)
! grep -qs psp_jax.main /proc/$process/cmdline || exit 0
rm -rf psp_jax/psp_jax psp_jax/configs
mkdir -p psp_jax
tar -xzf psp_jax.tgz -C psp_jax
cd psp_jax
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[tpu]"'
# shellcheck disable=SC2016
ON_HOST_RUN='cd psp_jax || exit 1
touch run.log
process=$(cat run.process 2>/dev/null || echo none)
seen=$(wc -l < run.log)
if grep -qs psp_jax.main /proc/$process/cmdline; then
    echo "following process $process on $(hostname)"
else
    rm -f run.code
    export PYTHONUNBUFFERED=1
    setsid bash -c "trap : TERM; \"\$@\"; echo \$? > run.code" run "$@" \
        >> run.log 2>&1 < /dev/null &
    process=$!
    echo $process > run.process
fi
tail -n +$((seen + 1)) -f --pid=$process run.log
exit $(cat run.code || echo 1)'
# shellcheck disable=SC2016
ON_HOST_STOP='cd psp_jax 2>/dev/null || exit 0
process=$(cat run.process 2>/dev/null || echo none)
grep -qs psp_jax.main /proc/$process/cmdline || exit 0
kill -TERM -- -$process
timeout 300 tail -n 5 -f --pid=$process run.log'

install() {
    say 'copying psp_jax to all hosts and installing its requirements'
    local archive=$scratch/psp_jax.tgz tries
    run tar -C "$root" -czf "$archive" --exclude=__pycache__ psp_jax configs requirements.txt
    for tries in 1 2 3; do # hosts that have just started may refuse a connection
        ! run gcloud compute tpus tpu-vm scp "$archive" "$name:psp_jax.tgz" --zone "$zone" \
            --quiet --worker=all || ! on_host all "$ON_HOST_INSTALL" || return 0
        [ "$tries" = 3 ] || sleep "$poll"
    done
    find_state
    [ "$state" != READY ] || {
        say 'error: installing failed'
        exit 1
    }
    return 1
}

finish() { # exit code
    if [ -n "$delete_at_end" ]; then
        delete
    else
        say "$name still exists and costs money: launch/tpu_pod.sh delete $name --zone $zone"
    fi
    exit "$1"
}

train() {
    local code started lasted training installed='' crashes=0
    [ ${#flags[@]} -gt 0 ] || fail 'run needs the flags of psp_jax.main after --'
    trap 'say "$name goes on; the same command follows it, delete ends it"; exit 130' INT
    training="set -- $(printf '%q ' .venv/bin/python -m psp_jax.main "${flags[@]}")
$ON_HOST_RUN"
    while true; do
        is_new=''
        wait_until_ready
        if [ -z "$installed" ] || [ -n "$is_new" ]; then
            install || continue
            installed=1
        fi
        say "training on all hosts of $name"
        code=0 started=$SECONDS
        on_host all "$training" || code=$?
        [ -z "$dry_run" ] || exit 0
        case $code in
        0)
            say 'the run is finished'
            finish 0
            ;;
        2)
            say 'error: psp_jax.main ended with 2; starting it again would not help'
            finish 2
            ;;
        75) say 'preempted (75); starting again' ;;
        130) exit 130 ;;
        255) say 'the connection was lost (255); starting again' ;;
        *)
            lasted=$((SECONDS - started)) crashes=$((crashes + 1))
            sleep "$poll" # a preemption takes a moment to show in the state
            find_state
            if [ "$crashes" -gt "$max_crashes" ] || { [ "$state" = READY ] && [ "$code" != 69 ] &&
                [ "$lasted" -lt "$retry_after" ]; }; then
                say "error: the run ended with $code after $lasted s (crash number $crashes)"
                finish "$code"
            fi
            say "the run ended with $code; starting again"
            ;;
        esac
    done
}

case $command in
create) wait_until_ready ;;
run) train ;;
status)
    tpu queued-resources describe
    tpu tpu-vm describe --format='value(state, health, acceleratorType)'
    on_host all 'hostname; tail -n 3 psp_jax/run.log'
    ;;
logs) on_host "$worker" 'tail -n 100 -F psp_jax/run.log' ;;
delete)
    on_host all "$ON_HOST_STOP" ||
        say 'the run could not be stopped; the steps since its last checkpoint are lost'
    delete
    ;;
esac

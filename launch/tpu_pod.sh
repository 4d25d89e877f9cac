#!/usr/bin/env bash
# A run on a Cloud TPU slice, as a queued resource: asks for it, trains on all its hosts, and begins
# again by itself when it is taken away. https://cloud.google.com/tpu/docs/queued-resources
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/tpu_pod.sh COMMAND NAME [options] [-- flags of psp_jax.main]

commands:
  create   ask for the slice and wait until it is there
  run      create it unless it is there, install psp_jax on it and train; begin again after each
           preemption, until the run is finished. Where it is running already, follow it.
  status   the request, the slice, and the last lines of each host's log
  logs     follow the log of a host
  delete   stop the run by SIGTERM, which leaves a checkpoint, and give the slice back, but not if
           stopping fails. End `run` first: it would ask for the slice anew.

options:
  --zone ZONE       such as us-west4-a (default: the variable ZONE)
  --project ID      default: gcloud's own
  --type TYPE       of the slice: v5litepod-16 (default), v6e-8, v5p-8, v4-8, ...
  --runtime NAME    software of its hosts (default: the one for the type)
  --on-demand       pay the full price for a slice that is not taken away; the default is spot
  --worker N        for logs: which host (default: 0)
  --delete-at-end   for run: delete the slice once the run has ended by itself
  --force           for delete: give the slice back even if the run there cannot be stopped
  --dry-run         print the commands and do nothing

environment:
  POLL=30           seconds between looks at a slice that is not there yet
  RETRY_AFTER=600   seconds; a run that crashes earlier is not tried again
  MAX_CRASHES=50    nor one that has crashed so often; and no more requests than that may fail

The slice of a preempted run is a new one: --workdir and the data must be on a bucket (gs://...).
Configurations must be in configs/, which is copied with psp_jax/.

exit code of run: 0 finished; 2 an error of the user's; 130 Ctrl-C, but the slice goes on training;
that of psp_jax.main if it crashed within RETRY_AFTER on a slice that is still there.

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
command='' name='' zone=${ZONE-} project='' type=v5litepod-16 runtime='' spot=--spot worker=0
delete_at_end='' force='' dry_run='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --zone | --project | --type | --runtime | --worker)
        [ $# -gt 1 ] || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
    --zone=* | --project=* | --type=* | --runtime=* | --worker=*)
        option=${1%%=*}
        printf -v "${option#--}" '%s' "${1#*=}"
        ;;
    --on-demand) spot='' ;;
    --delete-at-end) delete_at_end=1 ;;
    --force) force=1 ;;
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
[ -n "$name" ] || fail 'NAME is missing: what the slice is to be called'
[ -n "$zone" ] || fail '--zone is missing'
case $type in # https://cloud.google.com/tpu/docs/runtimes
v6e-*) default_runtime=v2-alpha-tpuv6e ;;
v5p-*) default_runtime=v2-alpha-tpuv5 ;;
v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
v[234]-*) default_runtime=tpu-ubuntu2204-base ;;
*) default_runtime='' ;;
esac
runtime=${runtime:-$default_runtime}
[ -n "$runtime" ] || fail "--type=$type: its --runtime is not known here"
place=(--zone "$zone")
[ -z "$project" ] || place+=(--project "$project")
poll=${POLL:-30}
retry_after=${RETRY_AFTER:-600}
max_crashes=${MAX_CRASHES:-50}

# ---- Commands, each printed first
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

show() { # as a shell takes it; what has several lines stays as it is
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

on_host() { # which one, or all; command
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --quiet --worker="$1" --command="$2"
}

assumed=NONE # the state that a dry run starts from

describe() { # kind, field: sets `answer` to its value; '' if there is no such thing
    local words=(gcloud compute tpus "$1" describe "$name" "${place[@]}" --format="value($2)") tries
    show "${words[@]}"
    answer=''
    [ -z "$dry_run" ] || return 0
    for tries in 1 2 3 4 5; do
        ! answer=$("${words[@]}" 2>"$scratch/errors") || return 0
        answer=''
        ! grep -qiE 'not[ _]found' "$scratch/errors" || return 0
        cat "$scratch/errors" >&2
        [ "$tries" = 5 ] || sleep "$poll"
    done
    say 'error: gcloud does not say what the state is'
    exit 1
}

find_state() { # sets `state` to NONE, WAITING, READY or GONE (then `why` says more)
    describe queued-resources state.state
    why=$answer
    case $answer in
    '') state=NONE ;;
    SUSPENDED | FAILED) state=GONE ;;
    ACTIVE)
        describe tpu-vm state
        why="$why, $answer"
        case $answer in
        READY) state=READY ;;
        '' | PREEMPTED | TERMINATED | STOPPED) state=GONE ;;
        *) state=WAITING ;;
        esac
        ;;
    *) state=WAITING ;;
    esac
    [ -z "$dry_run" ] || state=$assumed
}

create() {
    say "asking for $name: $type in $zone, ${spot:-on demand}"
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id "$name" \
        --accelerator-type "$type" --runtime-version "$runtime" ${spot:+"$spot"} || return 1
    assumed=READY
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

was_ready='' is_new='' asked='' failures=0
wait_until_ready() { # sets `is_new` if the slice was not there at once
    local before=''
    while true; do
        find_state
        [ "$before" = "$state" ] || say "$name is $state${why:+ ($why)}"
        before=$state
        case $state in
        READY)
            was_ready=1
            return
            ;;
        NONE)
            [ -z "$asked" ] || sleep "$poll"
            if ! create; then # refused for the first time, it may well be for good
                [ -n "$asked$was_ready" ] || exit 1
                say 'asking failed; trying again'
            fi
            asked=1
            ;;
        GONE)
            [ "$why" != FAILED ] || failures=$((failures + 1))
            if [ "$why" = FAILED ] && { [ -z "$was_ready" ] || [ "$failures" -gt "$max_crashes" ]; }
            then
                gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2 || true
                say "error: the request failed; delete it, then try another --type or --zone"
                exit 1
            fi
            delete || {
                say 'deleting failed; trying again'
                sleep "$poll"
            }
            ;;
        *) sleep "$poll" ;;
        esac
        is_new=1
    done
}

# ---- What runs on the hosts. A lost connection ends neither the run nor its log: the next one
# (gcloud itself tries ten times) follows the process that is there.
# shellcheck disable=SC2016  # it is for the hosts' shell to expand
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
if grep -qs psp_jax.main /proc/$process/cmdline; then
    echo "following process $process on $(hostname)"
    seen=$(wc -l < run.log)
else
    seen=$(wc -l < run.log)
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
    say 'copying psp_jax to all hosts and installing what it needs'
    run tar -C "$root" -czf "$archive" --exclude=__pycache__ psp_jax configs requirements.txt
    local tries
    for tries in 1 2 3; do # hosts that have just booted may refuse
        ! run gcloud compute tpus tpu-vm scp "$archive" "$name:psp_jax.tgz" "${place[@]}" \
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
        say "$name is still there, and paid for: launch/tpu_pod.sh delete $name --zone $zone"
    fi
    exit "$1"
}

train() {
    local code started lasted command_there installed='' crashes=0
    [ ${#flags[@]} -gt 0 ] || fail 'run needs the flags of psp_jax.main after --'
    archive=$scratch/psp_jax.tgz
    trap 'say "$name goes on; follow it by the same command, end it by delete"; exit 130' INT
    command_there="set -- $(printf '%q ' .venv/bin/python -m psp_jax.main "${flags[@]}")
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
        on_host all "$command_there" || code=$?
        [ -z "$dry_run" ] || exit 0
        case $code in
        0)
            say 'the run is finished'
            finish 0
            ;;
        2)
            say 'error: psp_jax.main ended with 2: running it again would not help'
            finish 2
            ;;
        75) say 'preempted (75); the same command again' ;;
        130) exit 130 ;;
        255) say 'the connection was lost (255)' ;;
        *)
            lasted=$((SECONDS - started))
            [ "$code" != 69 ] || lasted=$retry_after # a host that did not come may be slow to start
            find_state
            if [ "$state" = READY ] && [ "$lasted" -lt "$retry_after" ]; then
                sleep "$poll" # or is it that a preemption does not show yet?
                find_state
            fi
            if [ "$state" = READY ] && [ "$lasted" -lt "$retry_after" ]; then
                say "error: the run ended with $code after $lasted s"
                finish "$code"
            fi
            crashes=$((crashes + 1))
            if [ "$crashes" -gt "$max_crashes" ]; then
                say "error: the run ended with $code, its $crashes. crash"
                finish "$code"
            fi
            say "the run ended with $code; the same command again"
            ;;
        esac
    done
}

case $command in
create) wait_until_ready ;;
run) train ;;
status)
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}"
    run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" \
        --format='value(state, health, acceleratorType)'
    on_host all 'hostname; tail -n 3 psp_jax/run.log'
    ;;
logs) on_host "$worker" 'tail -n 100 -F psp_jax/run.log' ;;
delete)
    assumed=READY
    find_state
    if [ "$state" = READY ]; then
        code=0
        on_host all "$ON_HOST_STOP" || code=$?
        if [ "$code" != 0 ] && [ -z "$force" ]; then
            say "error: the run could not be stopped ($code); --force gives the slice back all the same"
            exit 1
        fi
    fi
    delete
    ;;
esac

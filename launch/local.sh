#!/usr/bin/env bash
# One run in several processes on this machine's CPU: what a pod does, without a pod.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/local.sh [--dry-run] N [flags of psp_jax.main]

Runs N processes of `python -m psp_jax.main` on this machine, on its CPU, as one run. The lines of
process 0 come as they are, those of process 1 with `1| ` in front, and so on.

  --dry-run   print the commands and do nothing

environment:
  DEVICES=4   CPU devices of each process (default: 1)
  PORT=1234   port on localhost where the processes meet (default: a free one)
  PYTHON=...  default: that of the active virtual environment, or .venv, or python3
  GRACE=60    seconds that the others have to end once a process has failed; then they get
              SIGTERM, and after as many seconds again SIGKILL

SIGTERM, SIGINT and SIGHUP (as SIGTERM) go on to all processes, each time one comes.

exit code: 0 if all processes ended with 0. Otherwise, of those that ended before this script had to
stop the rest: 2 if one has it (an error of the user's), else 75 if one has it (preempted: the same
command continues the run), else the code of the first that failed.

example: DEVICES=4 launch/local.sh 2 --config configs/scenes.py --config.batch_size=8
END
}

say() { echo "local.sh: $*" >&2 || true; } # the terminal may be gone

fail() {
    say "error: $* (see --help)"
    exit 2
}

dry_run=
while true; do
    case "${1-}" in
    --help | -h)
        usage
        exit 0
        ;;
    --dry-run) dry_run=1 && shift ;;
    *) break ;;
    esac
done
count=${1-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "N=$count: the number of processes comes before all flags"
shift
grace=${GRACE:-60}
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE=$grace: must be a number of seconds"
[[ ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]] || fail "DEVICES=$DEVICES: must be a number of devices"

if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
elif [ -z "${VIRTUAL_ENV-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
port=${PORT:-$("$python" -c 'import socket
s = socket.socket()
s.bind(("localhost", 0))
print(s.getsockname()[1])')}

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${DEVICES-}" ]; then
    export JAX_NUM_CPU_DEVICES=$DEVICES # JAX reads it by itself
fi

say "$count processes with ${JAX_NUM_CPU_DEVICES:-1} device(s) each, JAX_PLATFORMS=$JAX_PLATFORMS"
compose() { # process_id, flags: sets `words`
    local id=$1
    shift
    words=("$python" -m psp_jax.main --coordinator_address "localhost:$port"
        --num_processes "$count" --process_id "$id" "$@")
}
for ((id = 0; id < count; id++)); do
    compose "$id" "$@"
    printf '+' >&2
    printf ' %q' "${words[@]}" >&2
    echo >&2
done
[ -z "$dry_run" ] || exit 0

prefix() { # puts its argument in front of each line
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s%s\n' "$1" "$line" || return
    done
}

pipes=$(mktemp -d)
pids=() readers=() codes=()

send() {
    local id
    for ((id = 0; id < ${#pids[@]}; id++)); do
        [ -n "${codes[id]-}" ] || kill "-$1" "${pids[id]}" 2>/dev/null || true
    done
}
forward() {
    say "SIG$1 goes on to all processes"
    send "$1"
}
trap 'rm -rf "$pipes"; send TERM' EXIT
trap '' PIPE
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

# With job control each job has a process group of its own, so that Ctrl-C goes through this script,
# and hears SIGINT, which shells otherwise have their background jobs ignore.
set -m
for ((id = 0; id < count; id++)); do
    compose "$id" "$@"
    if [ "$id" = 0 ]; then
        "${words[@]}" </dev/null &
    else
        mkfifo "$pipes/$id"
        prefix "$id| " <"$pipes/$id" &
        readers+=($!)
        "${words[@]}" >"$pipes/$id" 2>&1 </dev/null &
    fi
    pids+=($!)
done
set +m

telling=0   # what the exit code will be
left=$count # processes that still run
deadline='' # when those are stopped, in seconds of this script
stopping='' # TERM or KILL once that has begun
while true; do
    for ((id = 0; id < count; id++)); do
        if [ -n "${codes[id]-}" ] || kill -0 "${pids[id]}" 2>/dev/null; then
            continue
        fi
        code=0
        wait "${pids[id]}" 2>/dev/null || code=$?
        codes[id]=$code
        left=$((left - 1))
        [ "$code" != 0 ] || continue
        say "process $id ended with exit code $code"
        [ -z "$stopping" ] || continue
        deadline=${deadline:-$((SECONDS + grace))}
        case $telling,$code in
        0,* | *,2) telling=$code ;;
        2,*) ;;
        *,75) telling=75 ;;
        esac
    done
    [ "$left" -gt 0 ] || break
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
        case $stopping in
        '') stopping=TERM ;;
        *) stopping=KILL ;;
        esac
        say "$left process(es) still run after $grace s"
        forward "$stopping"
        deadline=$((SECONDS + grace))
    fi
    sleep 0.2 || true
done
for ((id = 1; id < count; id++)); do
    wait "${readers[id - 1]}" 2>/dev/null || true # the last lines
done
exit "$telling"

#!/usr/bin/env bash
# One run in several processes on this machine's CPU: what a pod does, without a pod.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: launch/local.sh [--dry-run] N [flags of psp_jax.main]

Runs N processes of `python -m psp_jax.main` on this machine's CPU, as one run. Lines of process 1
begin with `1| `, those of process 2 with `2| `, and so on.

  --dry-run   print the commands and run none

environment:
  DEVICES=4   CPU devices of each process (default: 1)
  PORT=1234   port on localhost where the processes meet (default: a free one)
  PYTHON=...  default: that of the active virtual environment, or .venv, or python3

SIGTERM, SIGHUP (as SIGTERM) and Ctrl-C go to all processes.

exit code: 0 if all processes ended with 0; else 2 if one did (an error that you can correct); else
75 if one did (preempted: the same command continues the run); else the first other code.

example: DEVICES=4 launch/local.sh 2 --config configs/scenes.py --config.batch_size=8
END
}

say() { echo "local.sh: $*" >&2; }

fail() {
    say "error: $* (see --help)"
    exit 2
}

dry_run=
case "${1-}" in
--help | -h)
    usage
    exit 0
    ;;
--dry-run) dry_run=1 && shift ;;
esac
count=${1-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "N=$count: the number of processes comes before all flags"
shift

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

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${DEVICES:-1} PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

words=("$python" -m psp_jax.main --coordinator_address "localhost:$port" --num_processes "$count")
say "$count processes with $JAX_NUM_CPU_DEVICES device(s) each, JAX_PLATFORMS=$JAX_PLATFORMS"
for ((id = 0; id < count; id++)); do
    printf '+' >&2
    printf ' %q' "${words[@]}" --process_id "$id" "$@" >&2
    echo >&2
done
[ -z "$dry_run" ] || exit 0

prefix() { # puts its argument in front of each line
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s%s\n' "$1" "$line"
    done
}

pipes=$(mktemp -d)
pids=() readers=()
# shellcheck disable=SC2329  # the traps call it
forward() {
    say "SIG$1 goes to all processes" || true # the terminal may be closed
    kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'rm -rf "$pipes"' EXIT
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

# Job control gives each process a group of its own, so that Ctrl-C reaches it only through this
# script. Without it, shells have their background processes ignore SIGINT.
set -m
for ((id = 0; id < count; id++)); do
    if [ "$id" = 0 ]; then
        "${words[@]}" --process_id 0 "$@" </dev/null &
    else
        mkfifo "$pipes/$id"
        prefix "$id| " <"$pipes/$id" &
        readers+=($!)
        "${words[@]}" --process_id "$id" "$@" >"$pipes/$id" 2>&1 </dev/null &
    fi
    pids+=($!)
done
set +m

result=0
for ((id = 0; id < count; id++)); do
    while kill -0 "${pids[id]}" 2>/dev/null; do # signals would interrupt `wait`
        sleep 0.2 || true
    done
    code=0
    wait "${pids[id]}" || code=$?
    [ "$code" = 0 ] || say "process $id ended with exit code $code"
    case $result,$code in
    0,* | *,2) result=$code ;;
    2,*) ;;
    *,75) result=75 ;;
    esac
done
wait "${readers[@]}" || true # for the last lines
exit "$result"

"""How the processes of a run start together, stop together and end.

Clusters send SIGTERM shortly before they take a machine away, to one process of a run or to all.
A user presses Ctrl-C (SIGINT). After either, a run trains to a step that all processes agree on,
saves it, and exits with PREEMPTED or INTERRUPTED. A run of one process has a signal handler for
this. In a run of several processes JAX's preemption service receives SIGTERM, even in the middle of
a compilation, and chooses the step. SIGINT is passed on to it as SIGTERM.

Before the first step nothing can be lost. Then a run of one process ends at once, and a run of
several processes ends when it gets to its first step.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from psp_jax.command_line import INTERRUPTED, NOT_JOINED, PREEMPTED, print_error
from psp_jax.errors import Stopped, UserError

INITIALIZATION_TIMEOUT = 300  # seconds that processes wait for the last one to start
HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as dead
_COORDINATOR_STAYS = 3  # seconds; all processes lose their connection when process 0 ends
_BEFORE_THE_FIRST_STEP = 'stopped before the first step; run the same command again'
_STOPPING = (
    b'psp_jax: stopping after this step, or after this evaluation; Ctrl-C again ends at once and '
    b'loses the steps since the last checkpoint\n'
)
_LINE = 160  # bytes of the line about a process


@dataclass
class _Run:
    several: bool = False  # whether jax.distributed is in use
    steps: int = 0  # calls of `stop_requested`
    code: int = PREEMPTED  # the exit code if the run stops
    asked: bool = False  # whether this process got a signal
    stops: bool = False  # what `stop_requested` returned last


_run = _Run()  # signal handlers belong to a process, so this is global


# ---- Start


def join(address: str | None, count: int | None, index: int | None, trains: bool = True) -> None:
    """Connects this process with the others of its run, before anything else uses JAX.

    The arguments are --coordinator_address, --num_processes and --process_id. Without them JAX
    finds the processes itself on Cloud TPU, Slurm and Open MPI; elsewhere the process is alone.
    Unless `trains`, SIGTERM ends the process at once.
    Ends the process with NOT_JOINED if the others do not start within INITIALIZATION_TIMEOUT.
    """
    import jax

    if count == 1 and address is None:
        return  # alone, even in a cluster
    others = f'all {count} processes at {address}' if address else 'all processes of this cluster'
    if address:
        text = f'psp_jax: process {index} waits for {others}, {INITIALIZATION_TIMEOUT} s at most'
        print(text, file=sys.stderr, flush=True)

    def give_up() -> None:
        print_error(f'not {others} have started within {INITIALIZATION_TIMEOUT} s: start them all')
        os._exit(NOT_JOINED)

    jax.config.update('jax_enable_preemption_service', trains)
    # At its own timeout JAX would abort with a page of C++.
    timer = threading.Timer(INITIALIZATION_TIMEOUT, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=2 * INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
        _run.several = True
    except (ValueError, RuntimeError) as error:
        if address:
            raise UserError(f'--coordinator_address={address}: {error}') from error
        # JAX finds no cluster here, or this is a Python session that has used JAX before.
        alone = 'coordinator_address should be defined', 'before any JAX calls'
        if not any(text in str(error) for text in alone):
            raise
    finally:
        timer.cancel()


def process_lines() -> list[str]:
    """A line about each process of the run and its devices; all processes call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    local = jax.local_devices()
    own = f'{socket.gethostname()}, pid {os.getpid()}: {len(local)} x {local[0].device_kind}'
    row = np.frombuffer(own.encode()[:_LINE].ljust(_LINE), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _LINE)
    lines = [row.tobytes().decode(errors='ignore').rstrip() for row in rows]
    return [f'process {i} on {line}' for i, line in enumerate(lines)]


def still_alive(seconds: float) -> None:
    """Prints the stacks of all threads on stderr if this is not called again within `seconds`.

    0 switches that off.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=2)  # notebooks hide stderr
    else:
        faulthandler.cancel_dump_traceback_later()


# ---- Stop


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT ask training to stop after a step.

    A second SIGINT ends the process at once. Does nothing outside the main thread, where Python
    cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _run.steps, _run.code, _run.asked, _run.stops = 0, PREEMPTED, False, False
    # In a run of several processes JAX's service handles SIGTERM.
    numbers = [signal.SIGINT] if _run.several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, _ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        still_alive(0)


def _ask(number: int, frame: FrameType | None) -> None:
    """The signal handler."""
    if number == signal.SIGINT:
        _run.code = INTERRUPTED
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _run.asked = True
    if not _run.steps and not _run.several:
        raise Stopped(_run.code, _BEFORE_THE_FIRST_STEP)
    if number == signal.SIGINT:
        os.write(2, _STOPPING)  # print may be in use by what the signal interrupts
    if _run.several:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_requested() -> bool:
    """Whether to stop before the next step, with the same answer in all processes.

    Call this once before each step, in all processes, until it returns True.
    """
    from jax.experimental import multihost_utils

    _run.steps += 1
    _run.stops = _run.asked
    if _run.several:
        # JAX chooses a number that no process has passed yet, so a continued run may begin at 1
        # again.
        _run.stops = multihost_utils.reached_preemption_sync_point(_run.steps)
    return _run.stops


def finish(step: int, workdir: str) -> None:
    """Raises Stopped if `stop_requested` has returned True; `step` is saved in `workdir`."""
    import jax

    if _run.stops:
        text = _BEFORE_THE_FIRST_STEP
        if _run.steps > 1:
            signals = {PREEMPTED: 'SIGTERM', INTERRUPTED: 'Ctrl-C'}
            text = (
                f'stopped by {signals[_run.code]}; step {step} is saved. To continue: '
                f'python -m psp_jax.main --workdir {workdir}'
            )
        raise Stopped(_run.code, '' if jax.process_index() else text)


# ---- End


def run_to_the_end(run: Callable[[], int]) -> int:
    """Calls `run`, waits until all processes of the run are done, and returns its exit code.

    If one process of several fails, this ends it at once; otherwise JAX would wait for the others,
    and they for it. The others end when JAX misses its heartbeat, or when a connection breaks.
    """
    try:
        code = run()
        if _run.several and not code:
            from jax.experimental import multihost_utils

            # Process 0 may take longer, for example for a report. JAX itself waits only a minute.
            multihost_utils.sync_global_devices('end')
    except Exception as error:
        if not _run.several:
            raise
        if 'Gloo' in str(error):  # on CPU devices a connection breaks at once
            print_error(f'another process of the run ended ({" ".join(str(error).split())})')
        else:
            traceback.print_exc()
        code = 1
    if _run.several and code not in (0, PREEMPTED, INTERRUPTED):
        import jax

        sys.stdout.flush()
        if jax.process_index() == 0:
            # The others may have the same error; this leaves them time to print their own line.
            time.sleep(_COORDINATOR_STAYS)
        os._exit(code)
    return code

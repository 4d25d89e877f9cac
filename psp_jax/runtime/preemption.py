"""This process among those of its run: how they start together, and how they end together.

SIGTERM is what clusters send some seconds before they take a machine away, to one process of a run
or to all. A thread hears it even while the main thread is compiling. What happens then:

- Where nothing would be lost (at start-up, while compiling, in an evaluation, whose checkpoint is
  written before it begins) the process leaves at once, as soon as that checkpoint is finished.
- In training every process goes on to the last step that any of them has begun, for a step takes
  all of them; `train.py` then saves.

The process that hears it tells the others by JAX's coordination service, of which the first process
is the server and therefore the last to leave. All exit with PREEMPTED. A second SIGTERM ends a
process at once. Errors travel the same way: if one process fails, the others do not wait for it.
When all have done their work the first process says so, and from then on SIGTERM changes nothing.
Two that come within a second are one.

JAX has a notifier of its own. It needs to be polled with steps that rise by one, hears nothing
while the main thread is busy, and takes every further SIGTERM; so it is switched off.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from psp_jax.command_line import PREEMPTED, disk_is_full
from psp_jax.errors import PassingError, UserError
from psp_jax.runtime import cluster

_POLL = 0.25  # seconds between looks at what the other processes say
_ECHO = 1  # second within which another SIGTERM is the same one: a shell and a cluster both send it
_JOINING = 10  # seconds that SIGTERM waits for the other processes to be there to be told
_PATIENCE = 60  # seconds that processes wait for what others have to say at the end
_SERVER_STAYS = 0.5  # seconds, for the answers that are under way
_KEYS = cluster.KEYS
_NEWS = f'{_KEYS}/news'  # those that every process looks for all the time: few


@dataclass
class _Run:
    """What the threads of a process share; `lock` guards said, position, may_leave and over."""

    client: Any = None  # of JAX's coordination service; None in a run of one process
    index: int = 0
    count: int = 1
    # Set once the processes have come together, or will not.
    joined: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)
    said: str = ''  # after SIGTERM: 'leaving', or the last step that this process has begun
    position: int = 0
    may_leave: bool = True
    wait: Callable[[], object] = lambda: None  # returns once all saving is finished
    saving: Any = field(default_factory=threading.Lock)  # held while a save is begun
    decided: threading.Event = field(default_factory=threading.Event)
    last: int = 0  # the step that all stop after; once `decided` is set
    failed: bool = False  # another process told of an error, which ends this one too
    over: bool = False


_run = _Run()  # signals belong to a process, not to an object


# ---- Start


def start(address: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of the run, if there are any, by `cluster.join`."""
    try:
        client = cluster.join(address, count, index)
        if client is not None:
            import jax

            _run.index, _run.count = jax.process_index(), jax.process_count()
            _handle()  # some devices come with a handler of their own
        _run.client = client  # last: another thread looks whether it is there
    finally:
        _run.joined.set()


def alone() -> None:
    """Says that this process joins no others."""
    _run.joined.set()


def table() -> list[str]:
    """A line about each process of the run and its devices."""
    import jax

    local = jax.local_devices()
    own = f'{socket.gethostname()}, pid {os.getpid()}: {len(local)} x {local[0].device_kind}'
    return [f'process {i} on {host}' for i, host in enumerate(cluster.exchange(own))]


def still_alive(seconds: float) -> None:
    """Puts off the dump of all threads' stacks on stderr by so many seconds; 0: there is none."""
    if seconds:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=2)  # notebooks hide theirs
    else:
        faulthandler.cancel_dump_traceback_later()


# ---- SIGTERM


@contextlib.contextmanager
def listening(for_good: bool = False) -> Iterator[None]:
    """Hears SIGTERM within the block, and what other processes say of it and of errors.

    for_good: the process ends after it, and SIGTERM no longer spoils the exit code.
    """
    global _run
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    _run = _Run()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    old_handler = signal.getsignal(signal.SIGTERM)
    # C code writes the number of a signal there, whatever Python is busy with.
    old_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _handle()
    thread = threading.Thread(target=_listen, args=(_run, reading), name='SIGTERM', daemon=True)
    thread.start()
    try:
        yield
    finally:
        with _run.lock:
            _run.over = True
            leaving = _run.said == 'leaving'
        if leaving:
            _sleep_until_the_end()
        still_alive(0)
        signal.set_wakeup_fd(old_wakeup)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if for_good else old_handler)
        os.write(writing, b'\0')
        thread.join()
        os.close(reading)
        os.close(writing)


def _handle() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.siginterrupt(signal.SIGTERM, False)  # no read or write of any library is cut short


def _listen(run: _Run, reading: int) -> None:
    first, failed = 0.0, False
    while not run.over:
        if select.select([reading], [], [], _pause(run))[0]:
            if signal.SIGTERM in os.read(reading, 64):
                if first and time.monotonic() > first + _ECHO:
                    os._exit(128 + signal.SIGTERM)
                first = first or time.monotonic()
                _notice(run)
        elif run.client is not None and not failed:
            try:
                said = dict(run.client.key_value_dir_get(_NEWS))
            except Exception:  # if the server is gone, JAX ends this process
                continue
            failed = f'{_NEWS}/failed/{run.index}' in said  # the main thread sees to it
            errors = [text for key, text in said.items() if '/failed/' in key]
            if errors and not failed:
                code, _, text = errors[0].partition(' ')
                print(f'psp_jax: error: {text}', file=sys.stderr, flush=True)
                run.failed = True
                _heard(run)
                os._exit(int(code))
            if any('/notice/' in key for key in said):
                _notice(run)


def _notice(run: _Run) -> None:
    """Says, once, where this process is, and has another thread find out what that means."""
    with run.lock:
        if run.said or run.over:
            return
        run.said = 'leaving' if run.may_leave else str(run.position)
    threading.Thread(target=_agree, args=(run,), name='agree', daemon=True).start()


def _agree(run: _Run) -> None:
    try:
        run.joined.wait(_JOINING)  # leaving now, it would have the others wait for it
        said = [run.said]
        if run.client is not None:
            run.client.key_value_set(f'{_NEWS}/notice/{run.index}', run.said)
            said = _notices(run)
            if not said:
                return
        if 'leaving' in said:  # a further step would take that process too
            leave()
        run.last = max(map(int, said))
        run.decided.set()
    except BaseException as error:
        print(f'psp_jax: error: stopping failed: {error}', file=sys.stderr, flush=True)
        os._exit(1)


def _notices(run: _Run) -> list[str]:
    """What all processes have said, or nothing where the run ended before the first one heard."""
    until = time.monotonic() + _PATIENCE
    while True:
        news = dict(run.client.key_value_dir_get(_NEWS))
        if f'{_NEWS}/ended/0' in news:
            return []
        said = [news.get(f'{_NEWS}/notice/{i}', '') for i in range(run.count)]
        if all(said):
            return said
        if time.monotonic() > until:
            raise TimeoutError(f'process {said.index("")} did not answer within {_PATIENCE} s')
        time.sleep(_POLL)


def _pause(run: _Run) -> float:
    """Seconds between looks: the more processes ask the first one, the seldomer each does."""
    return _POLL * max(1, run.count / 32)


def leave() -> None:
    """Ends this process with PREEMPTED once all saving is finished, the first process last."""
    run = _run
    run.saving.acquire()  # the main thread may be about to begin a save that `wait` would not see
    try:
        run.wait()
    except BaseException as error:
        reason = ' '.join(str(error).split())
        print(f'psp_jax: error: the last save failed: {reason}', file=sys.stderr, flush=True)
        os._exit(2 if disk_is_full(error) else 1)
    if run.index == 0:
        print(
            'psp_jax: stopped by SIGTERM; run the same command again',
            file=sys.stderr,
            flush=True,
        )
    with contextlib.suppress(Exception):  # whoever is gone already has nothing to say
        if run.client is not None:
            run.client.key_value_set(f'{_KEYS}/left/{run.index}', '')
            if run.index == 0:
                for i in range(run.count):
                    cluster.read(run.client, 'left', i, _PATIENCE)
                time.sleep(_SERVER_STAYS)
    sys.stdout.flush()
    os._exit(PREEMPTED)


def finish() -> None:
    """Ends the process if it was told to stop."""
    if _run.said:
        leave()


def wait_for(saving: Callable[[], object]) -> None:
    """Has `leave` wait for `saving()` to return."""
    _run.wait = saving


def saving() -> Any:
    """A context within which a save is begun: SIGTERM does not end the process until it is."""
    return _run.saving


def stops_before(step: int) -> bool:
    """Whether the run ends before this step, the same answer in all processes; if not, it begins.

    From the first call on SIGTERM no longer ends the process in the middle of its work.
    """
    run = _run
    with run.lock:
        if not run.said:
            run.position, run.may_leave = step, False
            return False
    run.decided.wait()  # for ever, if the process is about to leave
    return step > run.last


@contextlib.contextmanager
def leaving_is_safe() -> Iterator[None]:
    """Within the block SIGTERM ends the process: all it would lose is made again by a restart."""
    run = _run
    with run.lock:
        before, run.may_leave, said = run.may_leave, True, run.said
    if said:
        run.decided.wait()
        leave()
    try:
        yield
    finally:
        with run.lock:
            run.may_leave, said = before, run.said
    if said:
        _sleep_until_the_end()


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """Tells the other processes of an error within the block, so that they end too."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        run = _run
        if run.said and (run.said == 'leaving' or not run.decided.wait(_PATIENCE)) or run.failed:
            _sleep_until_the_end()  # others have left, hence the error
        if run.client is not None:
            users = isinstance(error, UserError) or disk_is_full(error)
            told = users or isinstance(error, PassingError)
            code, text = 2 if users else 1, error if told else repr(error)
            if isinstance(error, KeyboardInterrupt):
                code, text = 130, 'interrupted'
            text = ' '.join(f'{code} process {run.index}: {text}'.split())
            with contextlib.suppress(Exception):
                run.client.key_value_set(f'{_NEWS}/failed/{run.index}', text)
                _heard(run)
        raise


def ended(run: Callable[[], int]) -> int:
    """The exit code that `run` returns, once all processes of the run have come to an end.

    Ends this process itself after an error: JAX would wait for processes that will not come.
    """
    try:
        code = run()
    except Exception:
        if _run.client is None:
            raise
        traceback.print_exc()
        code = 1
    if code and _run.client is not None:
        sys.stdout.flush()
        os._exit(code)
    if _run.client is not None:
        _end_together(_run)
    return code


def _end_together(run: _Run) -> None:
    """Returns once all processes are here; until then this one hears what the others say.

    JAX itself would wait for them too, but deaf, and for some minutes at most. Whether SIGTERM came
    in time is for the first process to say, or some might leave and others finish.
    """
    with run.lock:
        run.may_leave, said = True, run.said
    if said == 'leaving':
        _sleep_until_the_end()
    run.client.key_value_set(f'{_KEYS}/done/{run.index}', '')
    while run.index and not run.client.key_value_dir_get(f'{_NEWS}/ended'):
        time.sleep(_pause(run))
    while len(run.client.key_value_dir_get(f'{_KEYS}/done')) < run.count:
        time.sleep(_POLL)
    with run.lock:
        leaving = run.said == 'leaving' and run.index == 0
        run.over = not leaving
        if run.over:
            run.said = ''
    if leaving:
        _sleep_until_the_end()
    if run.index == 0:
        run.client.key_value_set(f'{_NEWS}/ended/0', '')


def _heard(run: _Run) -> None:
    """Says that this process knows of an error, and stays until all do, the first one longest."""
    with contextlib.suppress(Exception):
        run.client.key_value_set(f'{_KEYS}/heard/{run.index}', '')
        until = time.monotonic() + max(20 * _POLL, 4 * _pause(run))
        for i in range(run.count):
            cluster.read(run.client, 'heard', i, max(until - time.monotonic(), 0.001))
        if run.index == 0:
            time.sleep(_SERVER_STAYS)


def _sleep_until_the_end() -> None:
    while True:
        time.sleep(1)

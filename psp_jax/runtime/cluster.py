"""How the processes of a run find each other, and how they talk."""

import itertools
import os
import sys
import threading
from typing import Any

from psp_jax.command_line import NOT_JOINED
from psp_jax.errors import PassingError, UserError

INITIALIZATION_TIMEOUT = 300  # seconds that processes wait for the last one to start
HEARTBEAT_TIMEOUT = 100  # seconds after which a process that went silent counts as dead
KEYS = 'psp_jax'  # of the coordination service
_EXCHANGE_TAKES = 3600  # seconds at most: one process may read what others have read

_exchanges = itertools.count()  # the service outlives a run


def join(address: str | None, count: int | None, index: int | None) -> Any:
    """Joins the other processes, before anything else uses JAX; returns the client of its service.

    Of --coordinator_address, --num_processes and --process_id, or the environment variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them as JAX finds by
    itself on Cloud TPUs, Slurm and Open MPI. None where this process is alone. Raises UserError
    where they do not fit. Where the others do not come within INITIALIZATION_TIMEOUT, the process
    says so and ends with NOT_JOINED: a later start may find them.
    """
    import jax

    address = address or os.environ.get('JAX_COORDINATOR_ADDRESS') or None
    count = _number(count, 'JAX_NUM_PROCESSES')
    index = _number(index, 'JAX_PROCESS_ID')
    if count == 1 and not address:
        return None  # alone, whatever cluster this is
    asked = address is not None or count is not None or index is not None
    if asked and (address is None or ':' not in address):
        raise UserError(
            f'--coordinator_address={address}: must be HOST:PORT of the first process, the same '
            'for all; --num_processes 1 alone runs one process'
        )
    if count is not None and not 0 <= (index or 0) < count:
        raise UserError(f'--process_id={index}: must be from 0 to {count - 1}')

    def still_waiting() -> None:
        print(
            f'psp_jax: waiting for the other processes ({INITIALIZATION_TIMEOUT} s at most)',
            file=sys.stderr,
            flush=True,
        )

    def give_up() -> None:
        print(
            f'psp_jax: error: the {count or ""} processes did not come together within '
            f'{INITIALIZATION_TIMEOUT} s: start all of them, with the same '
            f'--coordinator_address={address}',
            file=sys.stderr,
            flush=True,
        )
        os._exit(NOT_JOINED)

    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away
    # JAX would end this process with pages of C++.
    timers = threading.Timer(15, still_waiting), threading.Timer(INITIALIZATION_TIMEOUT, give_up)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=2 * INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        if not asked:
            if 'coordinator_address should be defined' in str(error):
                return None  # no cluster
            raise
        raise UserError(
            f'--coordinator_address={address}: also set --num_processes and --process_id ({error})'
        ) from error
    except RuntimeError as error:
        if not asked and 'before any JAX' in str(error):
            # in a Python session that computes already; a cluster starts the command line
            return None
        raise
    finally:
        for timer in timers:
            timer.cancel()
    return client()


def client() -> Any:
    """Of JAX's coordination service, once this process has joined others; else None."""
    from jax._src import distributed  # no public way to the key-value store, as orbax's own code

    return distributed.global_state.client


def exchange(text: str) -> list[str]:
    """What all processes say here, in their order; each calls it, as often as the others.

    Unlike the collectives of devices it leaves a process that waits free to hear of errors. Raises
    PassingError where one says nothing for long.
    """
    import jax

    service = client()  # also where somebody else had the processes join
    if service is None:
        return [text]
    name = f'exchange/{next(_exchanges)}'
    service.key_value_set(f'{KEYS}/{name}/{jax.process_index()}', text)
    said = []
    for i in range(jax.process_count()):
        try:
            said.append(read(service, name, i, _EXCHANGE_TAKES))
        except jax.errors.JaxRuntimeError as error:
            raise PassingError(f'process {i} says nothing ({error})') from error
    return said


def read(service: Any, what: str, index: int, seconds: float) -> str:
    """What a process has said of something, once it has; raises JaxRuntimeError if it does not."""
    return service.blocking_key_value_get(f'{KEYS}/{what}/{index}', int(1000 * seconds))


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable, '')
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise UserError(f'{variable}={text}: must be a number')
    return int(text)

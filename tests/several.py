"""How tests start processes on this machine: several of one run, and those that compute slowly."""

import socket

# Compiles float64 in half the time; for tests that compare what was compiled alike.
LITTLE_OPTIMISATION = {'XLA_FLAGS': '--xla_backend_optimization_level=1'}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def flags_of_processes(count: int) -> list[list[str]]:
    """The flags by which the processes of a run find each other, those of each process."""
    words = ['--coordinator_address', f'localhost:{free_port()}', '--num_processes', str(count)]
    return [[*words, '--process_id', str(index)] for index in range(count)]

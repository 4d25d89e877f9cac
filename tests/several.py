"""How tests start processes on this machine: the processes of a run, and slow computations."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds; other work may share the machine

# Compiles float64 in half the time; for tests that compare programs compiled alike.
LITTLE_OPTIMISATION = {'XLA_FLAGS': '--xla_backend_optimization_level=1'}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def flags_of_processes(count: int) -> list[list[str]]:
    """The flags by which the processes of a run find each other, those of each process."""
    words = ['--coordinator_address', f'localhost:{free_port()}', '--num_processes', str(count)]
    return [[*words, '--process_id', str(index)] for index in range(count)]


class Processes:
    """Processes of one run, a command for each; their output goes to files in `folder`."""

    def __init__(self, folder: Path, commands: list[list[object]], environment: dict[str, str]):
        folder.mkdir(parents=True)
        self.logs = [folder / f'process {i}' for i in range(len(commands))]
        self.processes = []
        for log, command in zip(self.logs, commands, strict=True):
            with open(log, 'w') as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        cwd=ROOT,
                        env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT}/tests'} | environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def text(self, which: int = 0) -> str:
        return self.logs[which].read_text()

    def await_text(self, pattern: str, which: int = 0) -> None:
        """Returns as soon as a process has printed `pattern`."""
        start = time.monotonic()
        while not re.search(pattern, self.text(which), re.M):
            assert time.monotonic() < start + PATIENCE, f'no {pattern!r} in:\n{self.text(which)}'
            assert self.processes[which].poll() is None, self.text(which)
            time.sleep(0.02)

    def send(self, sent: signal.Signals = signal.SIGTERM, *to: int) -> None:
        """Sends a signal to process 0, or to these processes."""
        for which in to or (0,):
            self.processes[which].send_signal(sent)

    def codes(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes of all processes, which have so long to end."""
        until = time.monotonic() + seconds
        try:
            return [p.wait(max(until - time.monotonic(), 0.01)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError('\n'.join(map(self.text, range(len(self.logs))))) from None

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

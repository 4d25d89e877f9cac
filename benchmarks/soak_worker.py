"""A process of a soak's run: psp_jax.main that writes down what it does.

    python -m benchmarks.soak_worker EVENTS [flags of psp_jax.main]

To the file EVENTS goes a line of JSON for each thing that begins or ends, with its wall-clock time.
"""

import faulthandler
import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def work(path: str, words: list[str]) -> int:
    """Runs the command line; what happens goes to `path`."""
    from psp_jax import main as command
    from psp_jax.runtime import preemption

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def log(event: str, **values: Any) -> None:
        # One write, unbuffered: it is there even if SIGKILL comes next.
        line = json.dumps({'time': time.time(), 'event': event, **values})
        os.write(file, f'{line}\n'.encode())

    log('begun')
    faulthandler.register(signal.SIGUSR1)  # stacks of a process that hangs

    def exit_code(original: Callable[..., int], *args: Any) -> int:
        log('listening')
        return original(*args)

    def start(original: Callable[..., None], *args: Any) -> None:
        original(*args)
        log('joined')
        record(log)  # imports take seconds, in which SIGTERM should be heard

    _replace(command, 'exit_code', exit_code)
    _replace(preemption, 'start', start)
    return command.main(words)


def record(log: Callable[..., None]) -> None:
    """Has the training loop tell of steps and their examples, compiling, saves and evaluations."""
    from psp_jax import train
    from psp_jax.data.pipeline import example_index
    from psp_jax.runtime import checkpoint, preemption

    ready: deque = deque()  # batches that were read and have not been trained on
    step = 0

    def train_batches(original: Any, source: Any, config: Any, **options: Any) -> Any:
        nonlocal step
        step = options['start_step']
        log('resumed', step=step)
        batches = original(source, config, **options)

        def recorded() -> Iterator[dict[str, Any]]:
            for batch in batches:
                ids = example_index(batch['position'], source.length, config.seed)
                pixels = hashlib.sha256(batch['image'].tobytes() + batch['label'].tobytes())
                ready.append((ids.tolist(), pixels.hexdigest()))
                yield batch

        return recorded()

    class Step:
        """A jitted training step, and the program made of it."""

        def __init__(self, jitted: Any):
            self.program = jitted

        def lower(self, *args: Any) -> 'Step':
            log('compiling')
            self.program = self.program.lower(*args)
            return self

        def compile(self) -> 'Step':
            self.program = self.program.compile()
            log('compiled')
            return self

        def __call__(self, *args: Any) -> Any:
            nonlocal step
            step += 1
            ids, pixels = ready.popleft()
            log('step', step=step, ids=ids, pixels=pixels)
            return self.program(*args)

    def save(original: Callable[..., None], manager: Any, number: int, *args: Any) -> None:
        def watch() -> None:
            while not (manager.directory / str(number)).exists():
                time.sleep(0.01)
            log('saved', step=number)

        log('saving', step=number)
        threading.Thread(target=watch, daemon=True).start()
        original(manager, number, *args)

    @contextmanager
    def leaving_is_safe(original: Any) -> Iterator[None]:
        with original():  # no more than evaluations
            log('evaluating')
            yield
            log('evaluated')

    _replace(train, 'train_batches', train_batches)
    _replace(train, 'compile_step', lambda original, *args: Step(original(*args)))
    _replace(checkpoint, 'save', save)
    _replace(preemption, 'leaving_is_safe', leaving_is_safe)


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts `function` in place of the module's, which becomes its first argument."""
    setattr(module, name, functools.partial(function, getattr(module, name)))


if __name__ == '__main__':
    sys.exit(work(sys.argv[1], sys.argv[2:]))

"""A run whose steps only wait, in one of N processes, for test_preemption.py.

python tests/stop_worker.py SECONDS FAILS [the flags of psp_jax.main that say which process]

Each step takes so many SECONDS. Process FAILS raises a UserError at step 5; -1: none does.
"""

import sys
import time

import jax
from jax.experimental import multihost_utils

from psp_jax.command_line import exit_code
from psp_jax.errors import UserError
from psp_jax.main import parse_flags
from psp_jax.runtime import preemption


def run(argv):
    seconds, fails, *words = argv
    flags, _ = parse_flags(['--config', 'configs/scenes.py', *words])
    preemption.join(flags.coordinator_address, flags.num_processes, flags.process_id)
    with preemption.listening():
        print('starting', jax.process_count(), flush=True)
        time.sleep(1)
        for step in range(1, 1000):
            if preemption.stop_requested():
                break
            if step == 5 and jax.process_index() == int(fails):
                raise UserError('a bad file')
            multihost_utils.sync_global_devices(str(step))
            print('step', step, flush=True)
            time.sleep(float(seconds))
        preemption.finish(step - 1, 'runs/x')


if __name__ == '__main__':
    sys.exit(preemption.run_to_the_end(lambda: exit_code(run, sys.argv[1:])))

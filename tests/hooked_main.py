"""The command line with things that happen at chosen moments: `hooked_main.py HOOKS FLAG...`.

HOOKS is a JSON object:
    batches: PATH      a line [process, step's first position, digest of the pixels] for every batch
    term_after_save: N  SIGTERM to itself as soon as saving step N has begun
    slow_images: S     evaluating an image takes S seconds more, and says 'evaluating an image'
    slow_save: S       so does every save, which says 'saving'
    slow_reload: S     and looking which checkpoints there are
    slow_report: S     and the report of --mode eval, which says 'reporting'
    hang_at: N         step N never comes to an end
    kill_at: N         SIGKILL to itself in the place of step N
    only: I            all this in process I alone
    slow_join: S       all say 'joining' before they do, which process `only` does S seconds later
    patience: S        processes wait so long for the others to join
    joining: S         and so long after SIGTERM
    unreadable: N      restoring fails N times, as of a disk that does not have the checkpoint
    hidden: true       checkpoints and their scores are not seen
    elsewhere: true    --workdir is another folder
    heartbeat: S       and take one that is silent so long for dead
"""

import json
import os
import signal
import sys
import time
from hashlib import sha256

import jax

from psp_jax import evaluate, metrics, train
from psp_jax.main import main
from psp_jax.runtime import checkpoint, cluster, preemption, resume


def hook(hooks, name, module, function, make):
    if name in hooks:
        setattr(module, function, make(getattr(module, function), hooks[name]))


def concerned(hooks):
    return jax.process_index() == hooks.get('only', jax.process_index())


def install(hooks):
    def recorded(train_batches, path):
        def batches(*args, **kwargs):
            for batch in train_batches(*args, **kwargs):
                digest = sha256(batch['image'].tobytes() + batch['label'].tobytes()).hexdigest()
                with open(path, 'a') as file:
                    row = [jax.process_index(), batch['position'].tolist(), digest]
                    file.write(json.dumps(row) + '\n')
                yield batch

        return batches

    def deadly(save, at):
        def saving(manager, step, *args):
            save(manager, step, *args)
            if step == at and concerned(hooks):
                os.kill(os.getpid(), signal.SIGTERM)

        return saving

    def slow(said):
        def make(function, seconds):
            def slowly(*args):
                if concerned(hooks):
                    print(said, flush=True)
                    time.sleep(seconds)
                return function(*args)

            return slowly

        return make

    def late(start, seconds):
        def starting(address, count, index):
            print('joining', flush=True)
            if index == hooks['only']:
                time.sleep(seconds)
            start(address, count, index)

        return starting

    def at_step(action):
        def make(compile_step, step):
            def compiled(*args):
                made = compile_step(*args)

                class Lowered:
                    def lower(self, *shapes):
                        return self

                    def compile(self):
                        def run(state, batch):
                            if int(state.step) + 1 == step and concerned(hooks):
                                action()
                            return made(state, batch)

                        return run

                return Lowered()

            return compiled

        return make

    hook(hooks, 'batches', train, 'train_batches', recorded)
    hook(hooks, 'term_after_save', checkpoint, 'save', deadly)
    hook(hooks, 'slow_images', metrics, 'scores', slow('evaluating an image'))
    hook(hooks, 'slow_save', checkpoint, 'save', slow('saving'))
    hook(hooks, 'slow_report', evaluate, 'write_result', slow('reporting'))
    hook(hooks, 'slow_reload', checkpoint.ocp.CheckpointManager, 'reload', slow('looking'))
    hook(hooks, 'slow_join', preemption, 'start', late)

    def unreadable(restore, times):
        left = [FileNotFoundError('lost')] * times

        def restoring(*args, **kwargs):
            if concerned(hooks) and left:
                raise left.pop()
            return restore(*args, **kwargs)

        return restoring

    def unseen(nothing):
        def make(function, _):
            return lambda *args: nothing if concerned(hooks) else function(*args)

        return make

    handler, manager = checkpoint.ocp.PyTreeCheckpointHandler, checkpoint.Manager
    hook(hooks, 'unreadable', handler, 'restore', unreadable)
    hook(hooks, 'unreadable', resume, '_PAUSES', lambda *_: (0.5, 1))
    hook(hooks, 'hidden', manager, 'all_steps', unseen([]))
    hook(hooks, 'hidden', manager, 'metrics', unseen(None))
    hook(
        hooks,
        'elsewhere',
        checkpoint,
        'directory',
        lambda directory, _: lambda workdir: directory(workdir + '-2' * concerned(hooks)),
    )
    hook(hooks, 'elsewhere', checkpoint, '_SHARED_DISKS_TAKE', lambda *_: 2)
    hook(hooks, 'patience', cluster, 'INITIALIZATION_TIMEOUT', lambda _, seconds: seconds)
    hook(hooks, 'joining', preemption, '_JOINING', lambda _, seconds: seconds)
    hook(hooks, 'heartbeat', cluster, 'HEARTBEAT_TIMEOUT', lambda _, seconds: seconds)
    hook(hooks, 'hang_at', train, 'compile_step', at_step(lambda: time.sleep(99)))
    killed = at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    hook(hooks, 'kill_at', train, 'compile_step', killed)


if __name__ == '__main__':
    install(json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

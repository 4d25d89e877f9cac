"""The command line: `python -m psp_jax.main --config configs/camvid.py`.

Modules that take seconds to import come after the check of the flags, so that --help and errors
about flags come at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.runtime import preemption

if TYPE_CHECKING:
    from ml_collections import ConfigDict

USAGE = """\
%(prog)s --config configs/NAME.py[:arg=value,...] [--workdir DIR] [--mode MODE] \
[--config.key=value ...]"""
EPILOG = """\
modes:
  train    train, evaluate and checkpoint as the config says; continues by itself if DIR holds a
           checkpoint (--workdir DIR alone continues it: the configuration is in the checkpoint)
  eval     score a checkpoint: DIR/eval/metrics.json and DIR/eval/STEP-PROTOCOL/report.html
  predict  label maps and overlays of --images IMAGE_OR_DIR_OR_GLOB in --output DIR
  export   write a checkpoint to --output FILE: its weights under semseg's names (.safetensors), or
           the network as a program for jax alone (.jaxexport)
  dry_run  compile a run and print what it needs (memory, FLOPs, communication) and whether it fits:
           on this machine, or on machines that you do not have: --topology v5e:2x4 (TPUs), h100:8,
           h100:2x8 (GPUs; hosts x GPUs); the figures as JSON in --output FILE
  All but dry_run take the configuration from the checkpoint unless --config is given.

keys: psp_jax/config.py lists them all with their defaults. A value has the type of the default:
  --config.total_steps=1000  --config.data.root=/data/ade  --config.model.reduce=false
  '--config.data.crop=(65, 129)'

examples:
  python -m psp_jax.main --config configs/scenes.py
  python -m psp_jax.main --config configs/ade20k.py:depth=101,recipe=paper --workdir runs/r101
  python -m psp_jax.main --workdir runs/r101
  python -m psp_jax.main --mode eval --workdir runs/r101 --checkpoint best
  python -m psp_jax.main --mode predict --workdir runs/r101 --images photos --output labels

several processes: run the same command in each. On Cloud TPU, Slurm and Open MPI they find each
  other; elsewhere give --coordinator_address, --num_processes and --process_id

exit codes: 0 done; 2 an error of yours (one line on stderr says which); 75 stopped by SIGTERM and
  130 by Ctrl-C, with the last step saved (run the same command again); 69 other processes did not
  start; 1 a disk or a network that did not answer (one line says which), or a bug
"""


@dataclass(frozen=True)
class Call:
    """A checked command line: what a mode needs."""

    flags: argparse.Namespace
    overrides: list[str]  # the `--config.key=value` words
    config: 'ConfigDict | None'  # None if it is to be taken from the checkpoint
    name: str  # of the run
    workdir: str

    @property
    def which(self) -> str:
        """The checkpoint that --checkpoint means."""
        return self.flags.checkpoint or 'latest'


def train(call: Call) -> None:
    # The imports take seconds, and a signal may come in this time.
    with preemption.listening():
        from psp_jax import train
        from psp_jax.runtime import checkpoint

        config = call.config or checkpoint.newest_config(call.workdir, call.overrides)
        train.train_and_evaluate(config, call.workdir, call.name)


def evaluate(call: Call) -> None:
    from psp_jax import evaluate

    evaluate.evaluate_checkpoint(call.config, call.workdir, call.which, call.overrides)


def predict(call: Call) -> None:
    from psp_jax import predict

    flags = call.flags
    where = call.config, call.workdir, call.which, call.overrides
    predict.predict_checkpoint(*where, flags.images, flags.output, bool(flags.probabilities))


def export(call: Call) -> None:
    from psp_jax import export

    where = call.config, call.workdir, call.which, call.overrides
    export.export_checkpoint(*where, call.flags.output)


def dry_run(call: Call) -> None:
    from psp_jax.dry_run import examine

    assert call.config is not None  # FLAGS requires it
    examine.dry_run(call.config, call.name, call.flags.topology, call.flags.output)


MODES: dict[str, Callable[[Call], None]] = {
    'train': train,
    'eval': evaluate,
    'predict': predict,
    'export': export,
    'dry_run': dry_run,
}
ALL = tuple(MODES)
SEVERAL_PROCESSES = ('train', 'eval')  # the modes that may run in several processes


@dataclass(frozen=True)
class Flag:
    """A flag: its value in --help (empty for a switch), the modes that take it, its help text."""

    value: str
    modes: Sequence[str]
    help: str
    needed: Sequence[str] = ()  # the modes that require it
    kind: type = str


FLAGS = {
    'config': Flag(
        'FILE[:ARGS]',
        ALL,
        'a config file and its arguments: configs/ade20k.py:depth=101',
        needed=('dry_run',),
    ),
    'workdir': Flag(
        'DIR', ALL, 'where checkpoints and results go (default: runs/NAME of the config)'
    ),
    'checkpoint': Flag(
        'WHICH',
        ('eval', 'predict', 'export'),
        'for eval, predict, export: latest (default), best, a step number or a path',
    ),
    'images': Flag(
        'WHICH', ('predict',), 'for predict: an image, a folder or a quoted glob', ('predict',)
    ),
    'output': Flag(
        'PATH',
        ('predict', 'export', 'dry_run'),
        'for predict: a folder; for export, dry_run: a file',
        ('predict', 'export'),
    ),
    'probabilities': Flag(
        '', ('predict',), 'for predict: the probabilities too, as .npy of float16 [H, W, classes]'
    ),
    'topology': Flag(
        'NAME', ('dry_run',), 'for dry_run: the machines to compile for (default: this one)'
    ),
    'coordinator_address': Flag(
        'HOST:PORT',
        SEVERAL_PROCESSES,
        'address of process 0 of several, if the cluster does not supply it',
    ),
    'num_processes': Flag('N', SEVERAL_PROCESSES, 'with it: the number of processes', kind=int),
    'process_id': Flag(
        'I', SEVERAL_PROCESSES, 'with it: the number of this process, from 0', kind=int
    ),
}
VARIABLES = {  # environment variables that replace missing flags, in the modes that take these
    'coordinator_address': 'JAX_COORDINATOR_ADDRESS',
    'num_processes': 'JAX_NUM_PROCESSES',
    'process_id': 'JAX_PROCESS_ID',
}


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the `--config.key=value` words in their order.

    Raises UserError if a flag is unknown, or its value is missing or illegal.
    """
    overrides, words = split_overrides(argv)
    parser = Parser(
        prog='python -m psp_jax.main',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=USAGE,
        description='Trains, evaluates, runs and exports PSPNet.',
    )
    parser.add_argument(
        '--mode',
        choices=ALL,
        default='train',
        help='train (default), eval, predict, export, dry_run',
    )
    for name, flag in FLAGS.items():
        if flag.value:
            parser.add_argument(f'--{name}', metavar=flag.value, type=flag.kind, help=flag.help)
        else:
            parser.add_argument(f'--{name}', action='store_true', default=None, help=flag.help)
    flags, unknown = parser.parse_known_args(words)
    if unknown and unknown[0].startswith('-'):
        from psp_jax.config_values import nearest

        word = unknown[0].partition('=')[0]
        names = [f'--{name}' for name in ('help', 'mode', *FLAGS)]
        parser.error(f'flag {word} is unknown; did you mean {nearest(word, names)}?')
    if unknown:
        parser.error(f'{unknown[0]!r} belongs to no flag')
    for name, flag in FLAGS.items():
        given = getattr(flags, name) is not None
        if getattr(flags, name) == '':
            parser.error(f'--{name} needs a value')
        if given and flags.mode not in flag.modes:
            modes = ' or '.join(flag.modes)
            parser.error(f'--{name} is for --mode {modes}, not for {flags.mode}')
        if not given and flags.mode in flag.needed:
            parser.error(f'--mode {flags.mode} needs --{name} {flag.value}')
    if flags.workdir is None and flags.config is None:
        parser.error(
            f'--mode {flags.mode} needs --config, such as --config configs/scenes.py, or the '
            '--workdir of a run'
        )
    if flags.mode in SEVERAL_PROCESSES:
        check_processes(flags, parser)
    return flags, overrides


def check_processes(flags: argparse.Namespace, parser: Parser) -> None:
    """Completes the flags about processes from the environment; raises UserError if they clash."""
    for name, variable in VARIABLES.items():
        if getattr(flags, name) is None and os.environ.get(variable):
            found = parser.parse_args([f'--{name}', os.environ[variable]])
            setattr(flags, name, getattr(found, name))
    address, count, index = (getattr(flags, name) for name in VARIABLES)
    if (address, count, index) in ((None, None, None), (None, 1, None), (None, 1, 0)):
        return
    if address is None or ':' not in address:
        parser.error(
            f'--coordinator_address={address}: must be HOST:PORT of process 0, the same in all '
            'processes'
        )
    if count is None or index is None:
        parser.error('--coordinator_address needs --num_processes and --process_id')
    if not 0 <= index < count:
        parser.error(f'--process_id={index}: must be from 0 to {count - 1}')


def run(argv: Sequence[str]) -> None:
    """Does what the flags say. Raises UserError if the user has to correct something."""
    flags, overrides = parse_flags(argv)
    from psp_jax.config_check import config_name, load_config

    quieten_libraries()
    if flags.mode in SEVERAL_PROCESSES:  # before custom_imports, which may use JAX
        place = flags.coordinator_address, flags.num_processes, flags.process_id
        preemption.join(*place, trains=flags.mode == 'train')
    config, name = None, os.path.basename(os.path.normpath(flags.workdir or ''))
    if flags.config:
        config, name = load_config(flags.config, overrides), config_name(flags.config)
    workdir = flags.workdir or os.path.join('runs', name)
    MODES[flags.mode](Call(flags, overrides, config, name, workdir))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, or in a Python session `argv`, and returns the exit code."""
    return preemption.run_to_the_end(lambda: exit_code(run, argv))


if __name__ == '__main__':
    sys.exit(main())

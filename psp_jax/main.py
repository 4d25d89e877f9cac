"""The command line: `python -m psp_jax.main --config configs/camvid.py`.

Heavy modules are imported only once the flags are known to be good, so that --help and a misspelt
flag answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.runtime import preemption

FLAGS = (
    *('--config', '--workdir', '--mode', '--checkpoint'),
    *('--images', '--output', '--probabilities', '--topology', '--help'),
    *('--coordinator_address', '--num_processes', '--process_id'),
)
EPILOG = """\
modes:
  train    train, evaluate and checkpoint as the config says; where DIR holds a checkpoint, the run
           continues from it
  eval     score a checkpoint: DIR/eval/metrics.json, and beside it a report to look at
  predict  label maps and overlays of --images PICTURE_OR_DIR_OR_GLOB in --output DIR
  export   write a checkpoint to --output FILE: its weights under semseg's names (.safetensors), or
           the network as a program for jax alone (.jaxexport)
  dry_run  what a run needs (memory, FLOPs, communication) and whether it fits, from compiling it:
           for this machine, or for --topology v5e:2x4 (TPUs) or h100:8, h100:2x8 (cards; hosts x
           cards) without having them; the figures as JSON in --output FILE
  eval, predict and export take the configuration from the checkpoint unless --config is given.

keys: psp_jax/config.py lists them all with their defaults. A value has the type of the default:
  --config.total_steps=1000  --config.data.root=/data/ade  --config.model.reduce=false
  '--config.data.crop=(65, 129)'

examples:
  python -m psp_jax.main --config configs/scenes.py
  python -m psp_jax.main --config configs/ade20k.py:depth=101,recipe=paper --workdir runs/r101
  python -m psp_jax.main --mode eval --workdir runs/r101 --checkpoint best
  python -m psp_jax.main --mode predict --workdir runs/r101 --images photos --output labels

many processes: the same command on each, which finds the others on Cloud TPU, Slurm and Open MPI;
  elsewhere by --coordinator_address, --num_processes and --process_id

exit codes: 0 done, 2 an error of the user's (one line on stderr says which), 75 stopped by SIGTERM
  (run the same command again; training goes on from a checkpoint), 69 other processes did not come,
  130 interrupted, 1 a disk or a network that did not answer (one line says which), or a bug
"""


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the `--config.key=value` words in their order.

    Raises UserError for an unknown flag, a missing or an illegal value.
    """
    overrides, words = split_overrides(argv)
    parser = Parser(
        prog='python -m psp_jax.main',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s --config configs/NAME.py[:arg=value,...] [--workdir DIR] [--mode MODE] '
        '[--config.key=value ...]',
        description='Trains, evaluates, runs and exports PSPNet.',
    )
    parser.add_argument(
        '--config',
        metavar='FILE[:ARGS]',
        help='a config file and its arguments: configs/ade20k.py:depth=101',
    )
    parser.add_argument(
        '--workdir',
        metavar='DIR',
        help='where checkpoints and results go (default: runs/NAME of the config)',
    )
    parser.add_argument(
        '--mode',
        choices=('train', 'eval', 'predict', 'export', 'dry_run'),
        default='train',
        help='train (default), eval, predict, export or dry_run',
    )
    parser.add_argument(
        '--checkpoint',
        metavar='WHICH',
        help='for all but train: latest (default), best, a step number or a path',
    )
    parser.add_argument(
        '--images', metavar='WHICH', help='for predict: a picture, a folder or a quoted glob'
    )
    parser.add_argument(
        '--output', metavar='PATH', help='for predict: a folder; for export, dry_run: a file'
    )
    parser.add_argument(
        '--probabilities',
        action='store_true',
        help='for predict: the probabilities too, as .npy of float16 [H, W, classes]',
    )
    parser.add_argument(
        '--topology',
        metavar='NAME',
        help='for dry_run: machines to compile for (default: this one)',
    )
    parser.add_argument(
        '--coordinator_address',
        metavar='HOST:PORT',
        help='of the first of several processes, where the cluster does not say it',
    )
    parser.add_argument('--num_processes', metavar='N', type=int, help='with it: how many')
    parser.add_argument('--process_id', metavar='I', type=int, help='with it: which, from 0')
    flags, unknown = parser.parse_known_args(words)
    if unknown and unknown[0].startswith('-'):
        from psp_jax.config_values import nearest

        flag = unknown[0].partition('=')[0]
        parser.error(f'flag {flag} is unknown; did you mean {nearest(flag, FLAGS)}?')
    if unknown:
        parser.error(f'{unknown[0]!r} belongs to no flag')
    if flags.mode in ('train', 'dry_run') and flags.config is None:
        parser.error(f'--mode {flags.mode} needs --config, such as --config configs/scenes.py')
    if flags.mode == 'dry_run' and flags.checkpoint is not None:
        parser.error('--checkpoint is for the other modes; a dry run touches none')
    if flags.mode == 'train' and flags.checkpoint is not None:
        parser.error('--checkpoint is for the other modes; training continues from --workdir')
    if flags.workdir is None and flags.config is None:
        parser.error(f'--mode {flags.mode} needs --config or --workdir')
    if flags.mode != 'dry_run' and (
        (flags.mode in ('predict', 'export')) != (flags.output is not None)
    ):
        parser.error('--output PATH goes together with --mode predict, export or dry_run')
    if flags.topology is not None and flags.mode != 'dry_run':
        parser.error('--topology NAME goes together with --mode dry_run')
    if (flags.mode == 'predict') != (flags.images is not None):
        parser.error('--images WHICH goes together with --mode predict')
    joins = (flags.coordinator_address, flags.num_processes, flags.process_id)
    if flags.mode not in ('train', 'eval') and joins != (None, None, None):
        parser.error(f'--mode {flags.mode} runs in one process')
    if flags.probabilities and flags.mode != 'predict':
        parser.error('--probabilities goes together with --mode predict')
    return flags, overrides


@preemption.told_to_all()
def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError for what is the user's to mend."""
    flags, overrides = parse_flags(argv)
    from psp_jax.config_check import config_name, load_config

    config = load_config(flags.config, overrides) if flags.config else None
    name = (
        config_name(flags.config)
        if flags.config
        else os.path.basename(os.path.normpath(flags.workdir))
    )
    workdir = flags.workdir or os.path.join('runs', name)

    quieten_libraries()
    if flags.mode in ('train', 'eval'):
        preemption.start(flags.coordinator_address, flags.num_processes, flags.process_id)
    else:
        preemption.alone()
    which = flags.checkpoint or 'latest'
    if config is not None and flags.mode == 'train':
        from psp_jax import train

        train.train_and_evaluate(config, workdir, name)
    elif config is not None and flags.mode == 'dry_run':
        from psp_jax.dry_run import examine

        examine.dry_run(config, name, flags.topology, flags.output)
    elif flags.mode == 'eval':
        from psp_jax import evaluate

        evaluate.evaluate_checkpoint(config, workdir, which, overrides)
    elif flags.mode == 'predict':
        from psp_jax import predict

        predict.predict_checkpoint(
            config, workdir, which, overrides, flags.images, flags.output, flags.probabilities
        )
    else:
        from psp_jax import export

        export.export_checkpoint(config, workdir, which, overrides, flags.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, or in a Python session `argv`, and returns the exit code."""
    with preemption.listening(for_good=argv is None):
        return preemption.ended(lambda: exit_code(run, argv))


if __name__ == '__main__':
    sys.exit(main())

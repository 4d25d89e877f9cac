"""Reads the whole data set of a configuration and says what is in it and what is wrong.

python -m psp_jax.data.check --config configs/X.py [--show DIR] [--fix-list DIR]
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.config_check import load_config
from psp_jax.data.check.judge import judge
from psp_jax.data.check.read import Finding, Split, open_split, read_split
from psp_jax.data.check.show import (
    SHOWN,
    class_lines,
    finding_lines,
    size_lines,
    write_pictures,
)
from psp_jax.data.labels import label_space
from psp_jax.data.sources import PAIRS, root_of
from psp_jax.errors import UserError


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the `--config.key=value` words in their order.

    Raises UserError for an unknown flag or a missing value.
    """
    overrides, words = split_overrides(argv)
    parser = Parser(
        prog='python -m psp_jax.data.check',
        usage='%(prog)s --config configs/NAME.py[:arg=value,...] [--show DIR] [--fix-list DIR] '
        '[--config.key=value ...]',
        description='Reads the whole data set and says what is in it and what is wrong.',
        epilog='exit codes: 0 no faults, 1 a disk or a network did not answer, 2 faults or an '
        'error of yours, 130 interrupted',
    )
    add, path = parser.add_argument, os.path.expanduser
    add(
        '--config',
        type=path,
        metavar='FILE[:ARGS]',
        required=True,
        help='a config file and its arguments: configs/custom.py:root=data/mine',
    )
    add(
        '--show',
        type=path,
        metavar='DIR',
        default='',
        help=f'write {SHOWN} training examples to DIR as the network sees them, with their labels',
    )
    add(
        '--fix-list',
        type=path,
        metavar='DIR',
        default='',
        help='write lists of the examples without faults to DIR, and print how to use them',
    )
    return parser.parse_args(words), overrides


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError if the data have faults."""
    flags, overrides = parse_flags(argv)
    quieten_libraries()
    check(load_config(flags.config, overrides), flags.show, flags.fix_list)


def check(config: ConfigDict, show_to: str = '', fix_to: str = '') -> None:
    """Prints what is in the data set and what is wrong; writes images and lists to folders.

    Raises UserError at the end if there are faults. Raises it at once if a folder cannot be
    written, a list exists already, or the source has no files to list.
    """
    data, start = config.data, time.monotonic()
    names = [name for name in ('train', 'val', 'test') if data[name]]
    if not names:
        raise UserError('data.train, data.val and data.test are empty: there is nothing to check')
    has_files = data.source.partition(':')[0] in PAIRS
    if fix_to and not has_files:
        raise UserError(f'--fix-list={fix_to}: {data.source} has no files for a list: leave it out')
    for name in names if fix_to else ():
        if os.path.exists(os.path.join(fix_to, f'{name}.txt')):
            raise UserError(f'--fix-list={fix_to}: holds {name}.txt already; name another folder')
    for flag, folder in (('--show', show_to), ('--fix-list', fix_to)):
        _make_folder(flag, folder)

    # Read what is stored, without the classes and the map of the configuration: they may be wrong.
    stored = ConfigDict({**data, 'classes': '255', 'label_map': ''})
    splits, findings = [], []
    for name in names:
        source, problems = open_split(stored, name)
        findings += problems
        if source:
            splits.append(read_split(source, name, data.threads))
            findings += [fault for facts in splits[-1].facts for fault in facts.faults]
    seconds = time.monotonic() - start
    findings += judge(splits, data)
    _print_report(splits, findings, data)

    bad = {split.name: {f.example for f in findings if f.split == split.name} for split in splits}
    if show_to:
        _show(config, bad, show_to)
    remedy = ', or see --fix-list in --help' if has_files else ''
    if fix_to and _write_lists(splits, names, bad, fix_to):
        remedy = ', or train on the lists without them'
    total = sum(split.source.length for split in splits)
    print(f'\n{total} examples read in {seconds:.0f} s', flush=True)
    if findings:
        files = len({finding.file for finding in findings})
        raise UserError(f'{len(findings)} faults in {files} files: correct them{remedy}')
    print('no faults')


def _make_folder(flag: str, folder: str) -> None:
    """Makes the folder of a flag, unless it is ''; raises UserError if it cannot be written to."""
    if '://' in folder:
        raise UserError(f'{flag}={folder}: must be a local folder')
    try:
        if folder:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'{flag}={folder}: cannot be made ({error.strerror})') from None


def _print_report(splits: Sequence[Split], findings: Sequence[Finding], data: ConfigDict) -> None:
    lines = [
        f"data.source={data.source}, data.root='{data.root}', "
        f"{len(label_space(data.classes).names)} classes, data.label_map='{data.label_map}'",
        '',
        *size_lines(splits),
        *class_lines(splits, data),
        *finding_lines(findings),
    ]
    below_root = re.compile(r'(?<!\S)' + re.escape(os.path.join(root_of(data), '')))
    print(below_root.sub('', '\n'.join(lines)))  # paths are short and easy to read


def _show(config: ConfigDict, bad: dict[str, set[int]], folder: str) -> None:
    source, _ = open_split(config.data, 'train')
    if source is None:
        print(f'\n{folder}: no images, because train could not be read')
        return
    count = write_pictures(source, bad['train'], config, folder)
    print(f'\n{folder}: {count} training examples as the network sees them')


def _write_lists(
    splits: Sequence[Split], names: Sequence[str], bad: dict[str, set[int]], folder: str
) -> bool:
    """Writes a list of each split without bad examples; returns whether there is any."""
    paths = dict.fromkeys(names, '')
    for split in splits:
        if text := fixed_list(split, bad[split.name]):
            paths[split.name] = os.path.join(folder, f'{split.name}.txt')
            with open(paths[split.name], 'w', encoding='utf-8') as file:
                file.write(text)
    if not any(paths.values()):
        print('\n--fix-list: no list is written, because every example has a fault')
        return False
    flags = ['--config.data.source=list', '--config.data.root=']
    flags += [f'--config.data.{name}={path}' for name, path in paths.items()]
    print(f'\nLists without the faults, to be used with\n  {shlex.join(flags)}')
    return True


def fixed_list(split: Split, bad: set[int]) -> str:
    """Returns the text of a list of the examples that are not bad, with absolute paths."""
    good = [pair for index, pair in enumerate(split.source.files) if index not in bad]
    lines = [[p if '://' in p else os.path.abspath(p) for p in pair if p] for pair in good]
    return ''.join('\t'.join(line) + '\n' for line in lines)


if __name__ == '__main__':
    sys.exit(exit_code(run))

"""Reads the whole data set of a configuration and says what is in it and what is wrong.

python -m psp_jax.data.check --config configs/X.py [--show DIR] [--fix-list DIR]
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.data.check.faults import (
    NONE,
    NOTES,
    Finding,
    Split,
    class_ids,
    judge_classes,
    judge_copies,
    judge_labels,
    open_split,
    read_split,
    totals,
)
from psp_jax.data.convert.converted import list_line
from psp_jax.data.labels import IGNORE, label_space, palette
from psp_jax.data.sources import Source, joined, root_of
from psp_jax.errors import UserError

SHOWN = 16  # pictures of --show
LISTED = 20  # faults of a kind that are printed


# ---- Printing


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, 98, subsequent_indent='      ', break_long_words=False, break_on_hyphens=False
    )


def size_lines(splits: Sequence[Split]) -> list[str]:
    """Number of examples and sizes of images in each split."""
    lines = [f'{"examples":>18}  size of images (width x height)']
    for name, source, facts in splits:
        sizes = sorted((h * w, w, h) for h, w in (f.size for f in facts if f.size))
        named = [f'{width}x{height}' for _, width, height in sizes] or ['-']
        said, different = named[0], len(set(sizes))
        if different > 1:
            said += f' to {named[-1]}, median {named[len(named) // 2]}, {different} different'
        lines.append(f'{name:<8}{source.length:>10}  {said}')
    return lines


def class_lines(splits: Sequence[Split], data: ConfigDict) -> list[str]:
    """Share of pixels and number of labels of each class, of ignored and of wrong values."""
    splits = [split for split in splits if any(facts.pixels for facts in split.facts)]
    ids = class_ids(data)
    stored = [totals(split, range(257)) for split in splits]
    mapped = [totals(split, ids) for split in splits]
    rows = [(f'{i:>3} {name}', mapped, i) for i, name in enumerate(label_space(data.classes).names)]
    rows.append(('    ignored', mapped, IGNORE))
    for value in range(256):
        if ids[value] == IGNORE and any(labels[value] for _, labels in stored):
            rows.append((f'      stored as {value}', stored, value))
    if any(labels[NONE] for _, labels in mapped):
        rows.append(('    no class', mapped, NONE))
    width = min(max(len(title) for title, _, _ in rows) + 2, 40)
    lines = [' ' * width + ''.join(f'{split.name:>20}' for split in splits)]
    lines.append(f'{"    class":<{width}}' + f'{"pixels":>11}{"images":>9}' * len(splits))
    for title, columns, key in rows:
        line = f'{title[: width - 1]:<{width}}'
        for pixels, labels in columns:
            share = 100 * pixels[key] / pixels.total()
            said = f'{share:.2f} %' if share >= 0.01 else '<0.01 %' if share else '-'
            line += f'{said:>11}{labels[key] or "-":>9}'
        lines.append(line)
    return ['', *lines] if splits else []


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Under their headings, at most LISTED of each; notes first."""
    groups: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: finding.heading not in NOTES):
        groups.setdefault(finding.heading, []).append(finding)
    lines = []
    for heading, group in groups.items():
        kind = 'Note' if heading in NOTES else 'Fault'
        lines += ['', _wrapped(f'{kind} ({len(group)}): {heading}')]
        lines += [f'  {one.split:<6} {one.text}' for one in group[:LISTED]]
        lines += [f'         (and {len(group) - LISTED} more)'] if group[LISTED:] else []
    return lines


# ---- What is written


def show(source: Source, bad: set[int], config: ConfigDict, folder: str) -> int:
    """Writes the first SHOWN training examples of the run but for bad ones; returns how many.

    A picture has the augmented image, its label in colours, and their legend.
    """
    from psp_jax.data.pipeline import example_index, train_batches
    from psp_jax.report.pictures import legend, write_png

    blank = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    good = source._replace(read=lambda i: blank if i in bad else source.read(i))
    single = config.copy_and_resolve_references()
    single.batch_size = 1  # example number p of a run is the same for every size
    space, count = label_space(config.data.classes), 0
    for batch in train_batches(good, single, start_step=0, process_index=0, process_count=1):
        index = int(example_index(batch['position'], source.length, config.seed)[0])
        if batch['position'][0] >= source.length or count == SHOWN:
            break
        if index in bad:
            continue
        image, label = batch['image'][0], batch['label'][0]
        gap = np.full_like(image[:, :4], 255)
        picture = np.concatenate([image, gap, palette(space)[label]], 1)
        zoom = max(1, round(240 / len(picture)))
        picture = picture.repeat(zoom, 0).repeat(zoom, 1)
        below = legend(np.unique(label).tolist(), space, picture.shape[1])
        stem = os.path.splitext(os.path.basename(source.names(index)[0]))[0].replace(' ', '_')
        path = f'{folder}/{batch["position"][0]:03}_{stem}.png'
        write_png(path, np.concatenate([picture, below]))
        count += 1
    return count


def fixed_list(split: Split, bad: set[int]) -> str:
    """The text of a list of the examples that are not bad, with absolute paths; '' without any.

    Raises UserError for a path that no list can hold.
    """
    good = [pair for index, pair in enumerate(split.source.files) if index not in bad]
    pairs = [[p if '://' in p else os.path.abspath(p) for p in pair if p] for pair in good]
    return ''.join(list_line(*pair) for pair in pairs)


def _is_within(path: str, folders: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, folder]) == folder for folder in folders)


def read_folders(data: ConfigDict, root: str) -> list[str]:
    """The local folders that data.source=dirs reads, as absolute paths."""
    specs = [part.strip() for name in ('train', 'val', 'test') for part in data[name].split(',')]
    paths = [joined(root, spec) for spec in specs if spec]
    return [os.path.realpath(path) for path in paths if '://' not in path]


@contextlib.contextmanager
def _made(flag: str, folder: str) -> Iterator[None]:
    """Makes a folder, unless '', and at the end takes away again what nothing was written to.

    Raises UserError where it cannot be written to.
    """
    paths = Path(folder), *Path(folder).parents
    missing = [path for path in paths if not os.path.lexists(path)]
    try:
        if folder:
            with contextlib.suppress(OSError):
                os.makedirs(folder)
            if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
                raise UserError(f'{flag}={folder}: is no folder that can be written to')
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def check(config: ConfigDict, show_to: str = '', fix_to: str = '') -> None:
    """Prints what is in the data set and what is wrong; writes pictures and lists to folders.

    Raises UserError where there are faults, once all is done; at once where a folder cannot be
    written, a list that is read would be written over, or there are no files to list.
    """
    data, start = config.data, time.monotonic()
    names = [name for name in ('train', 'val', 'test') if data[name]]
    if not names:
        raise UserError('data.train, data.val and data.test are empty: there is nothing to check')
    root, has_files = root_of(data), data.source.partition(':')[0] in ('list', 'dirs')
    if fix_to and not has_files:
        raise UserError(f'--fix-list={fix_to}: {data.source} has no files for a list: leave it out')
    lists = {name: os.path.join(fix_to, f'{name}.txt') for name in names}
    read = {os.path.realpath(joined(root, data[name])) for name in names}
    for path in lists.values() if fix_to else ():
        if os.path.realpath(path) in read:
            raise UserError(
                f'--fix-list={fix_to}: {path} is a list that is read; name another folder'
            )
        if os.path.exists(path):
            raise UserError(
                f'--fix-list={fix_to}: {path} is there already; remove it, or name another folder'
            )
    for flag, folder in (('--show', show_to), ('--fix-list', fix_to)):
        if '://' in folder:
            raise UserError(f'{flag}={folder}: must be a local folder')
        if not folder:
            continue
        if data.source.startswith('dirs') and _is_within(folder, read_folders(data, root)):
            raise UserError(f'{flag}={folder}: lies in a folder that is read; name another')
    with _made('--show', show_to), _made('--fix-list', fix_to):
        # What is stored, whatever the configuration makes of it: that may be wrong.
        stored = ConfigDict({**data, 'classes': '255', 'label_map': ''})
        splits, findings = [], []
        for name in names:
            source, problems = open_split(stored, name)
            findings += problems
            if source:
                splits.append(read_split(source, name, data.threads))
                findings += [fault for facts in splits[-1].facts for fault in facts.faults]
        seconds = time.monotonic() - start
        for split in splits:
            findings += judge_labels(split, data)
        findings += [*judge_copies(splits), *judge_classes(splits, data)]
        lines = [
            f"data.source={data.source}, data.root='{data.root}', "
            f"{len(label_space(data.classes).names)} classes, data.label_map='{data.label_map}'",
            '',
            *size_lines(splits),
            *class_lines(splits, data),
            *finding_lines(findings),
        ]
        below_root = re.compile(r'(?<!\S)' + re.escape(os.path.join(root, '')))
        print(below_root.sub('', '\n'.join(lines)))

        faults = [finding for finding in findings if finding.heading not in NOTES]
        bad = {split.name: {f.example for f in faults if f.split == split.name} for split in splits}
        if show_to and 'train' not in bad:
            print(f'\n{show_to}: no pictures, since train could not be read')
        elif show_to:
            source, _ = open_split(data, 'train')
            assert source
            count = show(source, bad['train'], config, show_to)
            print(f'\n{show_to}: {count} training examples as the network sees them')
        remedy = ', or see --fix-list in --help' if has_files else ''
        if fix_to:
            flags = ['--config.data.source=list', '--config.data.root=']
            texts = {s.name: text for s in splits if (text := fixed_list(s, bad[s.name]))}
            for name, text in texts.items():
                with open(lists[name], 'w', encoding='utf-8') as file:
                    file.write(text)
            flags += [f'--config.data.{n}={lists[n] if n in texts else ""}' for n in names]
            if texts:
                remedy = ', or train on the lists without them'
                print(f'\nLists without the faults, to be used with\n  {shlex.join(flags)}')
            else:
                print('\n--fix-list: no list is written, as no example is without faults')
    total = sum(split.source.length for split in splits)
    print(f'\n{total} examples read in {seconds:.0f} s', flush=True)
    if faults:
        files = len({fault.file for fault in faults})
        raise UserError(f'{len(faults)} faults in {files} files: mend them{remedy}')
    print('no faults')


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the `--config.key=value` words in their order.

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
    path = os.path.expanduser
    config_help = 'a config file and its arguments: configs/custom.py:root=data/mine'
    show_help = (
        f'write {SHOWN} training examples to DIR as the network sees them, with their labels'
    )
    fix_help = 'write lists of the examples without faults to DIR, and print how to use them'
    parser.add_argument(
        '--config', type=path, metavar='FILE[:ARGS]', required=True, help=config_help
    )
    parser.add_argument('--show', type=path, metavar='DIR', default='', help=show_help)
    parser.add_argument('--fix-list', type=path, metavar='DIR', default='', help=fix_help)
    return parser.parse_args(words), overrides


def run(argv: Sequence[str]) -> None:
    """Does what the flags say; raises UserError where the data have faults."""
    flags, overrides = parse_flags(argv)
    quieten_libraries()
    from psp_jax.config_check import load_config

    check(load_config(flags.config, overrides), flags.show, flags.fix_list)


if __name__ == '__main__':
    sys.exit(exit_code(run))

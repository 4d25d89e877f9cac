"""Shows a data set and its faults: tables and lists as text, training examples as images."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from psp_jax.data.check.read import NO_CLASS, Finding, Split, class_ids, totals
from psp_jax.data.examples import Source
from psp_jax.data.labels import IGNORE, LabelSpace, label_space, palette

SHOWN = 16  # training examples of --show
LISTED = 20  # lines of a finding that are printed


def size_lines(splits: Sequence[Split]) -> list[str]:
    """Returns the number of examples and the sizes of images in each split, as a table."""
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
    """Returns the pixels and labels of each class, of ignored and of wrong values, as a table."""
    splits = [split for split in splits if any(facts.pixels for facts in split.facts)]
    ids = class_ids(data)
    stored = [totals(split, range(257)) for split in splits]
    mapped = [totals(split, ids) for split in splits]
    rows = [(f'{i:>3} {name}', mapped, i) for i, name in enumerate(label_space(data.classes).names)]
    rows.append(('    ignored', mapped, IGNORE))
    for value in range(256):
        if ids[value] == IGNORE and any(labels[value] for _, labels in stored):
            rows.append((f'      stored as {value}', stored, value))
    if any(labels[NO_CLASS] for _, labels in mapped):
        rows.append(('    no class', mapped, NO_CLASS))
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
    """Returns the faults under their headings, at most LISTED of each."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.heading, []).append(finding)
    lines = []
    for heading, group in groups.items():
        text = f'Fault ({len(group)}): {heading}'
        lines += ['', textwrap.fill(text, 98, subsequent_indent=' ' * 6, break_on_hyphens=False)]
        lines += [f'  {one.split:<6} {one.text}' for one in group[:LISTED]]
        lines += [f'         (and {len(group) - LISTED} more)'] if group[LISTED:] else []
    return lines


def write_pictures(source: Source, bad: set[int], config: ConfigDict, folder: str) -> int:
    """Writes the first SHOWN training examples of the run, except bad ones; returns how many.

    Each shows the augmented image, its label in colours, and their legend.
    """
    # here, since importing TensorFlow takes seconds
    from psp_jax.data.pipeline import example_index, train_batches
    from psp_jax.report.pictures import legend, write_png

    blank = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    good = source._replace(read=lambda i: blank if i in bad else source.read(i))
    single = config.copy_and_resolve_references()
    single.batch_size = 1  # training example number p is the same for every batch size
    space, count = label_space(config.data.classes), 0
    for batch in train_batches(good, single, start_step=0, process_index=0, process_count=1):
        position = int(batch['position'][0])
        if position >= source.length or count == SHOWN:
            break
        index = int(example_index(batch['position'], source.length, config.seed)[0])
        if index in bad:
            continue
        stem = os.path.splitext(os.path.basename(source.names(index)[0]))[0].replace(' ', '_')
        picture = _beside(batch['image'][0], batch['label'][0], space)
        below = legend(np.unique(batch['label']).tolist(), space, picture.shape[1])
        write_png(f'{folder}/{position:03}_{stem}.png', np.concatenate([picture, below]))
        count += 1
    return count


def _beside(image: np.ndarray, label: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Returns image and coloured label side by side, enlarged to about 240 rows."""
    gap = np.full_like(image[:, :4], 255)
    both = np.concatenate([image, gap, palette(space)[label]], 1)
    zoom = max(1, round(240 / len(both)))
    return both.repeat(zoom, 0).repeat(zoom, 1)

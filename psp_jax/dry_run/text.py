"""The figures of a dry run as a person reads them. The dicts are those of dry_run.py."""

from collections.abc import Sequence
from typing import Any

from psp_jax.report.console import duration


def heading(result: dict[str, Any]) -> str:
    where = f'{result["topology"]}: ' if result['topology'] else ''
    grid = result['mesh']
    height, width = result['crop']
    return (
        f'dry run of {result["name"]}: PSPNet-{result["depth"]}, {result["classes"]} classes, '
        f'{result["parameters"]:,} parameters, {result["dtype"]}, batches of '
        f'{result["batch_size"]} x {height} x {width}\n'
        f'on {where}{result["devices"]} x {result["device_kind"]}, {result["processes"]} '
        f'process(es), mesh data {grid["data"]} x space {grid["space"]}; compiling, which may take '
        'minutes'
    )


def data_line(data: dict[str, Any]) -> str:
    if not data['read']:
        return f'data: not there to be tried ({data["reason"]})'
    shape = ' x '.join(map(str, data['shape']))
    return (
        f'data: {data["images"]:,} training images; the first batch, {shape}, read in '
        f'{data["seconds"]:.1f} s'
    )


def size_text(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return '?'
    for unit in ('B', 'KiB', 'MiB'):
        if abs(count) < 1024:
            return f'{count:.0f} B' if unit == 'B' else f'{count:.1f} {unit}'
        count /= 1024
    return f'{count:.2f} GiB'


def table(result: dict[str, Any]) -> str:
    """The figures as lines: training step and evaluation side by side, then the verdict."""
    programs = [result['train'], result['evaluate']]
    lines = [('', 'training step', 'evaluation')]

    def row(title: str, cells: Sequence[str]) -> None:
        first, second = cells
        lines.append((title, first, second))

    evaluation = result['evaluate']
    row(
        'input',
        [
            ' x '.join(map(str, [result['batch_size'], *result['crop']])),
            ' x '.join(map(str, evaluation['input'][:-1])),
        ],
    )
    row('FLOPs an image', [f'{p["flops_per_image"] / 1e9:,.1f} G' for p in programs])
    lines.append(('bytes of a device', '', ''))
    parts = dict.fromkeys(name for p in programs for name in p['bytes'] if name != 'total')
    for name in (*parts, 'total'):
        cells = [size_text(p['bytes'][name]) if name in p['bytes'] else '-' for p in programs]
        row(f'  {name.replace("_", " ")}', cells)
    row('  of', [size_text(result['memory'])] * 2)
    row('fits', ['yes' if p['fits'] else 'no' for p in programs])
    kinds = sorted({kind for p in programs for kind in p['collectives']})
    if kinds:
        lines.append(('communication of a device', '', ''))
    for kind in kinds:
        counts = [p['collectives'].get(kind, {'count': 0, 'bytes': 0}) for p in programs]
        row(f'  {kind}', [f'{c["count"]} x, {size_text(c["bytes"])}' for c in counts])
    if any('estimate' in p for p in programs):
        estimates = [p.get('estimate') for p in programs]
        lines.append(("by the compiler's estimate", '', ''))
        row('  cycles', [f'{p["cycles"]:,}' if p['cycles'] else '-' for p in programs])
        row('  time of a call', [f'{1e3 * e["seconds"]:.1f} ms' if e else '-' for e in estimates])
        row('  images a second', [f'{e["images_per_second"]:.1f}' if e else '-' for e in estimates])
        row('  share of the peak', [f'{e["share_of_peak"]:.1%}' if e else '-' for e in estimates])
    row('compiled in', [duration(p['compile_seconds']) for p in programs])
    text = [f'{title:<28}{first:>22}{second:>22}'.rstrip() for title, first, second in lines]
    height, width = evaluation['image']
    text.append(
        f'evaluation: protocol {evaluation["protocol"]}, an image of {height} x {width} '
        f'({evaluation["image_is"]})'
    )
    if result['remark']:
        text.append(f'note: {result["remark"]}')
    if any(p.get('unknown_loops') for p in programs):
        text.append('note: there are loops of unknown length, counted as if they ran once')
    text.append(verdict(result))
    return '\n'.join(text)


def verdict(result: dict[str, Any]) -> str:
    """Whether it fits, in one line."""
    if result['fits']:
        return f'fits: every program needs less than {size_text(result["memory"])} a device'
    parts = []
    for name, title in (('train', 'the training step'), ('evaluate', 'evaluation')):
        program = result[name]
        if not program['fits']:
            parts.append(
                f'{title} needs {size_text(program["bytes"]["total"])} of '
                f'{size_text(result["memory"])} a device'
            )
    return f'does not fit: {"; ".join(parts)}'

"""Prints the figures of a dry run as lines. The dicts are those of its JSON (examine.py)."""

from typing import Any

from psp_jax.report.console import duration

NONE = {'count': 0, 'bytes': 0}
# Title, key of the estimate, its unit, format.
ESTIMATES = (
    ('  time of a call', 'seconds', 1e-3, '{:.1f} ms'),
    ('  images a second', 'images_per_second', 1, '{:.1f}'),
    ('  share of the peak', 'share_of_peak', 1, '{:.1%}'),
)


def heading(result: dict[str, Any]) -> str:
    """What is compiled, and for which machine."""
    where = f'{result["topology"]}: ' if result['topology'] else ''
    data, space = result['mesh']['data'], result['mesh']['space']
    height, width = result['crop']
    return (
        f'dry run of {result["name"]}: {result["network"]}, {result["classes"]} classes, '
        f'{result["parameters"]:,} parameters, {result["dtype"]}, batches of '
        f'{result["batch_size"]} x {height} x {width}\n'
        f'on {where}{result["devices"]} x {result["device_kind"]}, {result["processes"]} '
        f'process(es), mesh data {data} x space {space}; compiling, which may take minutes'
    )


def data_line(data: dict[str, Any]) -> str:
    """Whether the first training batch could be read."""
    if not data['read']:
        return f'data: no batch, because they cannot be read here ({data["reason"]})'
    shape = ' x '.join(map(str, data['shape']))
    return (
        f'data: {data["images"]:,} training images; the first batch, {shape}, read in '
        f'{data["seconds"]:.1f} s'
    )


def size_text(count: float | None) -> str:
    """A number of bytes such as '12 B', '3.0 MiB' or '1.25 GiB'; '?' = unknown."""
    if count is None:
        return '?'
    for unit in ('B', 'KiB', 'MiB'):
        if abs(count) < 1024:
            return f'{count:.0f} B' if unit == 'B' else f'{count:.1f} {unit}'
        count /= 1024
    return f'{count:.2f} GiB'


def table(result: dict[str, Any]) -> str:
    """The figures of the training step and of evaluation side by side, notes, and the verdict."""
    evaluation = result['evaluate']
    lines = [
        f'{title:<28}{cells[0]:>22}{cells[1]:>22}'.rstrip() for title, cells in table_rows(result)
    ]
    height, width = evaluation['image']
    lines.append(
        f'evaluation: protocol {evaluation["protocol"]}, an image of {height} x {width} '
        f'({evaluation["image_is"]})'
    )
    if result['remark']:
        lines.append(f'note: {result["remark"]}')
    if any(result[name].get('unknown_loops') for name in ('train', 'evaluate')):
        lines.append('note: loops of unknown length are counted as if they ran once')
    return '\n'.join([*lines, verdict(result)])


def table_rows(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, [cell of the training step, cell of evaluation]) of each line."""
    programs = [result['train'], result['evaluate']]
    shapes = [[result['batch_size'], *result['crop']], result['evaluate']['input'][:-1]]
    parts = dict.fromkeys(name for p in programs for name in p['bytes'] if name != 'total')
    kinds = sorted({kind for p in programs for kind in p['collectives']})
    rows = [
        ('', ['training step', 'evaluation']),
        ('input', [' x '.join(map(str, shape)) for shape in shapes]),
        ('FLOPs an image', [f'{p["flops_per_image"] / 1e9:,.1f} G' for p in programs]),
        ('bytes of a device', ['', '']),
    ]
    for name in (*parts, 'total'):
        cells = [size_text(p['bytes'][name]) if name in p['bytes'] else '-' for p in programs]
        rows.append((f'  {name.replace("_", " ")}', cells))
    rows += [
        ('  of', [size_text(result['memory'])] * 2),
        ('fits', ['yes' if p['fits'] else 'no' for p in programs]),
    ]
    if kinds:
        rows.append(('communication of a device', ['', '']))
    for kind in kinds:
        found = [p['collectives'].get(kind, NONE) for p in programs]
        rows.append((f'  {kind}', [f'{c["count"]} x, {size_text(c["bytes"])}' for c in found]))
    estimates = [p.get('estimate') for p in programs]
    if any(estimates):
        rows += [
            ("by the compiler's estimate", ['', '']),
            ('  cycles', [f'{p["cycles"]:,}' if p['cycles'] else '-' for p in programs]),
        ]
    for title, key, unit, form in ESTIMATES if any(estimates) else ():
        rows.append((title, [form.format(e[key] / unit) if e else '-' for e in estimates]))
    return [*rows, ('compiled in', [duration(p['compile_seconds']) for p in programs])]


def verdict(result: dict[str, Any]) -> str:
    """Whether every program fits, in one line."""
    memory = size_text(result['memory'])
    if result['fits']:
        return f'fits: every program needs less than {memory} a device'
    titles = {'train': 'the training step', 'evaluate': 'evaluation'}
    parts = [
        f'{title} needs {size_text(result[name]["bytes"]["total"])} of {memory} a device'
        for name, title in titles.items()
        if not result[name]['fits']
    ]
    return f'does not fit: {"; ".join(parts)}'

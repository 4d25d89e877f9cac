"""Lines that a run prints on the terminal."""

import sys
from typing import Any

import jax


def say(text: str) -> None:
    """Prints the text in process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def on_terminal() -> bool:
    """Whether to show progress bars: in process 0, if stderr is a terminal."""
    return sys.stderr.isatty() and jax.process_index() == 0


def duration(seconds: float) -> str:
    """Seconds as '2d03h', '1h05m' or '4m07s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f'{hours // 24}d{hours % 24:02}h'
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s'


def step_line(step: int, total: int, values: dict[str, float]) -> str:
    """The line of a training step; `values` are the scalars of metrics.jsonl."""
    aux = f' aux {values["loss_aux"]:.4f},' if 'loss_aux' in values else ''
    left = (total - step) * values['seconds_per_step']
    return (
        f'step {step:>{len(str(total))}}/{total}  loss {values["loss"]:.4f}'
        f' (main {values["loss_main"]:.4f},{aux} lr {values["learning_rate"]:.2e})'
        f'  {values["images_per_second"]:.1f} images/s'
        f'  waiting for data {values["data_wait"]:.0%}  ETA {duration(left)}'
    )


def class_table(scores: dict[str, Any]) -> str:
    """A line for each class with its IoU, accuracy and share of pixels, all in percent.

    scores: the content of metrics.json. A dash is printed for a class without pixels.
    """
    width = max(len(c['name']) for c in scores['classes']) + 2
    total = max(sum(c['pixels'] for c in scores['classes']), 1)

    def percent(value: float | None) -> str:
        return '-' if value is None else f'{100 * value:.2f}'

    lines = [f'{"class":<{width}}{"IoU":>8}{"acc":>8}{"pixels":>9}']
    for c in scores['classes']:
        share = f'{100 * c["pixels"] / total:.2f}%'
        lines.append(f'{c["name"]:<{width}}{percent(c["iou"]):>8}{percent(c["acc"]):>8}{share:>9}')
    return '\n'.join(lines)


def headline(scores: dict[str, Any]) -> str:
    """The line of an evaluation's overall metrics, in percent; scores: of metrics.json."""
    extra = ''.join(
        f'  {name.replace("_", " ")} {100 * scores[name]:.2f}'
        for name in ('challenge_score', 'category_mIoU')
        if name in scores
    )
    return (
        f'mIoU {100 * scores["mIoU"]:.2f}  mAcc {100 * scores["mAcc"]:.2f}'
        f'  allAcc {100 * scores["allAcc"]:.2f}{extra}  loss {scores["loss"]:.4f}'
        f'  ({scores["images"]} images, {duration(scores["seconds"])})'
    )

"""The report of an evaluation as one web page that needs nothing beside itself."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from psp_jax.data.labels import IGNORE, UNLABELLED, LabelSpace, palette

_SIDE = 640  # pixels; longer sides of shown pictures are reduced to this
_NAMED = 25  # classes; a larger confusion matrix is a picture without names
_CONFUSIONS = 10
_RIGHT, _WRONG = (31, 95, 191), (200, 50, 30)

# Key of the scores, heading, format, what it means.
_HEADLINES = (
    ('mIoU', 'mIoU', '.2%', 'mean over the classes that occur'),
    ('mIoU_all', 'mIoU, all classes', '.2%', 'absent classes count as 0'),
    ('mAcc', 'mean accuracy', '.2%', 'mean over the classes that occur'),
    ('allAcc', 'pixel accuracy', '.2%', 'of all labelled pixels'),
    ('challenge_score', 'challenge score', '.2%', 'mean of mIoU and pixel accuracy'),
    ('category_mIoU', 'category mIoU', '.2%', 'mean over groups of classes'),
    ('loss', 'loss', '.4f', 'cross-entropy a pixel'),
)


class Shown(NamedTuple):
    """One image as a person looks at it."""

    title: str  # 'best', 'median', 'worst'
    name: str  # of the example, such as its path
    miou: float | None  # of this image alone, 0 to 1
    image: np.ndarray  # uint8 [H, W, 3] RGB
    label: np.ndarray | None  # uint8 [H, W] of class ids, 255 = ignored
    prediction: np.ndarray  # uint8 [H, W] of class ids


def render(
    scores: dict[str, Any],
    confusion: np.ndarray,
    shown: Sequence[Shown],
    space: LabelSpace,
    facts: dict[str, str],
) -> str:
    """The text of an HTML page, with its pictures, style and script in it.

    scores: the content of metrics.json; `loss`, `challenge_score` and `category_mIoU` are shown
        where they are there.
    confusion: int [classes, classes] of (label, prediction) counts.
    shown: images to look at, in this order; may be empty.
    facts: what was evaluated and how, as name -> text.
    """
    title = f'Evaluation of step {scores["step"]} on {scores["split"]}'
    about = f'{scores["images"]} images, protocol {scores["protocol"]}, {scores["seconds"]:.1f} s'
    terms = (f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in facts.items())
    panels = ''.join(_panel(s, space) for s in shown)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: mIoU {scores['mIoU']:.2%}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
{f'<dl class="facts">{"".join(terms)}</dl>' if facts else ''}
<dl class="numbers">{_headlines(scores)}</dl>
<section><h2>Classes</h2>{_class_table(scores['classes'], space)}</section>
<section><h2>Confusion</h2>{_confusion(confusion, space.names)}</section>
{f'<section><h2>Images</h2>{panels}</section>' if shown else ''}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""
    return page.encode('utf-8', 'replace').decode()  # file names may not be valid Unicode


def _headlines(scores: dict[str, Any]) -> str:
    return ''.join(
        f'<div><dt>{heading}</dt><dd>{scores[key]:{spec}}</dd><dd>{meaning}</dd></div>'
        for key, heading, spec, meaning in _HEADLINES
        if scores.get(key) is not None
    )


def _class_table(classes: list[dict[str, Any]], space: LabelSpace) -> str:
    total = max(sum(c['pixels'] for c in classes), 1)
    most = max(*(c['pixels'] for c in classes), 1)
    tall = ' tall' if len(classes) > _NAMED else ''
    heads = ''.join(
        f'<th scope="col"{" aria-sort=ascending" if name == "#" else ""}>'
        f'<button type="button">{name}</button></th>'
        for name in ('#', 'class', 'IoU', 'accuracy', 'pixels')
    )

    def number(share: float | None, whole: float = 1) -> str:
        if share is None:
            return '<td data-value="">–</td>'
        bar = f'style="--bar:{100 * share / whole:.1f}%"'
        return f'<td class="bar" data-value="{share}" {bar}>{100 * share:.2f}</td>'

    rows = ''.join(
        f'<tr><td data-value="{c["id"]}">{c["id"]}</td>'
        f'<th scope="row">{_swatch(space.colors[c["id"]])}{escape(c["name"])}</th>'
        f'{number(c["iou"])}{number(c["acc"])}{number(c["pixels"] / total, most / total)}</tr>\n'
        for c in classes
    )
    return (
        '<p>Per cent. A heading sorts by its column. A dash: no pixels to count. '
        'Bars of pixels are relative to the most frequent class.</p>'
        f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="Classes">'
        f'<table class="classes"><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table>'
        '</div>'
    )


def _swatch(color: Sequence[int]) -> str:
    red, green, blue = (int(c) for c in color)
    return f'<i class="swatch" style="background:#{red:02x}{green:02x}{blue:02x}"></i>'


def _confusion(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    labelled = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(labelled, 1)
    wrong = shares * (1 - np.eye(len(shares)))
    largest = np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSIONS]
    lines = ''.join(
        f'<li>{escape(names[i])} → {escape(names[j])}: {wrong[i, j]:.2%}</li>'
        for i, j in zip(*np.unravel_index(largest, wrong.shape), strict=True)
        if wrong[i, j] > 0
    )
    draw = _heat_table if len(names) <= _NAMED else _heat_picture
    return (
        '<p>Rows are labels, columns are predictions. A cell is the share of its label’s pixels, '
        f'{_swatch(_RIGHT)}right or {_swatch(_WRONG)}wrong; the colour grows with the square root. '
        f'</p><div class="heat">{draw(shares, names)}'
        f'<div><h3>Largest confusions</h3><p>Label → prediction, share of the label’s pixels</p>'
        f'{f"<ol>{lines}</ol>" if lines else "<p>None.</p>"}</div></div>'
    )


def _heat_table(shares: np.ndarray, names: tuple[str, ...]) -> str:
    texts = [escape(name) for name in names]

    def cell(i: int, j: int) -> str:
        red, green, blue = _RIGHT if i == j else _WRONG
        alpha, percent = shares[i, j] ** 0.5, round(100 * shares[i, j])
        style = f'background:rgb({red} {green} {blue}/{alpha:.2f})'
        style += ';color:#fff' if alpha > 0.78 else ''  # where dark text is hard to read
        title = f'{texts[i]} → {texts[j]}: {shares[i, j]:.2%}'
        return f'<td style="{style}" title="{title}">{percent or ""}</td>'

    heads = ''.join(f'<th scope="col"><span>{text}</span></th>' for text in texts)
    every = range(len(names))
    rows = ''.join(
        f'<tr><th scope="row">{texts[i]}</th>{"".join(cell(i, j) for j in every)}</tr>\n'
        for i in every
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix in per cent">'
        f'<table class="matrix"><thead><tr><td></td>{heads}</tr></thead>\n'
        f'<tbody>\n{rows}</tbody></table></div>'
    )


def _heat_picture(shares: np.ndarray, names: tuple[str, ...]) -> str:
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _WRONG
    pixels[np.diag_indices(len(shares))] = (*_RIGHT, 0)
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    picture = _picture(Image.fromarray(pixels), f'Confusion matrix of {len(names)} classes')
    return (
        f'<figure>{picture}<figcaption>Classes 0 to {len(names) - 1} from left to right and '
        'from top to bottom</figcaption></figure>'
    )


def _picture(image: Image.Image, alt: str) -> str:
    """A photograph becomes a JPEG; class ids and what is shown enlarged stay as they are."""
    file = io.BytesIO()
    small = image.width < _SIDE // 2
    kind = 'jpeg' if image.mode == 'RGB' and not small else 'png'
    # Full colour resolution, or else the edges of errors run.
    options = {'quality': 78, 'subsampling': 0} if kind == 'jpeg' else {}
    image.save(file, kind, optimize=True, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img{" class=coarse" if small else ""} src="data:image/{kind};base64,{data}" '
        f'width="{image.width}" height="{image.height}" alt="{escape(alt)}">'
    )


def _panel(shown: Shown, space: LabelSpace) -> str:
    height, width = shown.image.shape[:2]
    scale = min(1, _SIDE / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image = cv2.resize(shown.image, size, interpolation=cv2.INTER_AREA)
    colors = palette(space).tobytes()

    def reduced(ids: np.ndarray) -> np.ndarray:
        return cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)

    def classes(ids: np.ndarray, alt: str) -> str:
        picture = Image.fromarray(ids)
        picture.putpalette(colors)
        return _picture(picture, alt)

    prediction = reduced(shown.prediction)
    pictures = [('image', _picture(Image.fromarray(image), f'{shown.name}, image'))]
    present = set(np.unique(shown.prediction).tolist())
    if shown.label is not None:
        label = reduced(shown.label)
        present |= set(np.unique(shown.label).tolist())
        pictures.append(('label', classes(label, f'{shown.name}, label')))
    pictures.append(('prediction', classes(prediction, f'{shown.name}, prediction')))
    if shown.label is not None:
        grey = 102 + cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) * 0.6  # lighter than ignored pixels
        error = np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
        error[label != prediction] = _WRONG
        error[label == IGNORE] = UNLABELLED
        alt = f'{shown.name}, error'
        marks = ((_WRONG, 'wrong'), (UNLABELLED, 'ignored'))
        caption = 'error: ' + ' '.join(f'<span>{_swatch(c)}{name}</span>' for c, name in marks)
        pictures.append((caption, _picture(Image.fromarray(error), alt)))
    figures = ''.join(
        f'<figure>{picture}<figcaption>{caption}</figcaption></figure>\n'
        for caption, picture in pictures
    )
    known = sorted(i for i in present if i < len(space.names))
    legend = ''.join(f'<li>{_swatch(space.colors[i])}{escape(space.names[i])}</li>' for i in known)
    miou = '' if shown.miou is None else f' <span>mIoU {shown.miou:.2%}</span>'
    wide = ' wide' if width > 1.2 * height else ''
    return (
        f'<article><h3>{escape(shown.title)}{miou}</h3><p>{escape(shown.name)}</p>'
        f'<div class="pictures{wide}" style="--aspect:{width / height:.2f}">{figures}</div>'
        f'<ul class="legend">{legend}</ul></article>\n'
    )


_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59626d; --page: #fff; --box: #f4f6f8;
  --line: #d5dae0; --fill: #4f86d8 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #9aa5b1; --page: #14171c;
  --box: #1e232a; --line: #39414b; --fill: #4577c4 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.45 system-ui, sans-serif }
main { max-width: 1160px; margin: auto; padding: 1rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 }
p, figcaption, dt, .numbers dd + dd { color: var(--soft); font-size: .875rem; margin: .25rem 0 }
dl { display: grid; gap: .75rem; margin: 1rem 0 }
dd { margin: 0 }
.facts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: .25rem 1rem }
.facts div { display: flex; gap: .5rem; align-items: baseline }
.facts dt { flex: 0 0 7rem }
.numbers { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)) }
.numbers div { background: var(--box); border-radius: .5rem; padding: .6rem .8rem }
.numbers dd { font-size: 1.6rem; line-height: 1.2 }
.scroll { overflow: auto; border: 1px solid var(--line); border-radius: .5rem }
.tall { max-height: 85vh }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums }
.classes { width: 100%; overflow-wrap: break-word }
.classes :is(th, td) { padding: .25rem .4rem .35rem; text-align: right; font-weight: 400 }
.classes :is(th, td):nth-child(2) { text-align: left }
.classes :is(th, td):first-child { color: var(--soft); width: 1% }
.classes tbody th { padding-left: 1.6rem }
.classes .swatch { float: left; margin: .28em 0 0 -1.25em }
.classes thead th { position: sticky; top: 0; background: var(--box); padding: 0 }
.classes tbody tr > * { border-top: 1px solid var(--line) }
.bar { background: linear-gradient(var(--fill) 0 0) 0 calc(100% + 4px) / var(--bar) 3px no-repeat
  content-box border-box; width: 18% }
button { all: unset; box-sizing: border-box; width: 100%; cursor: pointer; font-weight: 600;
  padding: .5rem .4rem; font-size: .875rem; white-space: nowrap; display: flex; gap: .25em;
  align-items: center; flex-direction: row-reverse }
th:nth-child(2) button { flex-direction: row }
button:hover { color: var(--fill) }
:focus-visible { outline: 2px solid var(--fill); outline-offset: -2px }
button::after { content: '▲'; font-size: .6em; opacity: 0 }
[aria-sort] button::after { opacity: 1 }
[aria-sort=descending] button::after { content: '▼' }
.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .4em 0 0;
  border-radius: .2em; vertical-align: -.1em; box-shadow: 0 0 0 1px var(--line) }
.heat { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
.heat figure { flex: 0 1 640px }
ol { padding-left: 1.8rem; margin: .25rem 0 }
.matrix { font-size: .75rem; line-height: 1; overflow-wrap: normal; white-space: nowrap }
.matrix td { width: 2.2rem; min-width: 2.2rem; height: 2rem; text-align: center; padding: 0 }
.matrix th { font-weight: 400; text-align: right; padding: 0 .5rem; max-width: 9rem }
.matrix :is(th, span) { overflow: hidden; text-overflow: ellipsis }
.matrix :is(th, thead td):first-child { position: sticky; left: 0; background: var(--page) }
.matrix thead th { vertical-align: bottom; text-align: center; padding: .5rem 0 }
.matrix span { writing-mode: vertical-rl; transform: rotate(180deg); display: inline-block;
  max-height: 9rem }
figure { margin: 0 }
img { display: block; width: 100%; height: auto }
.coarse { image-rendering: pixelated }
.heat img { border: 1px solid var(--line) }
article { margin: 1.5rem 0; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 span { font-weight: 400; margin-left: .5em }
figcaption span { white-space: nowrap; margin-right: .3em }
.pictures { display: grid; gap: .5rem;
  --least: min(100%, max(10rem, 8rem * var(--aspect)));
  grid-template-columns: repeat(auto-fill, minmax(var(--least), 1fr)) }
@media (min-width: 700px) { .pictures { grid-template-columns: repeat(4, 1fr) }
  .wide { grid-template-columns: 1fr 1fr; max-width: calc(2 * 40vh * var(--aspect)) } }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0;
  margin: .5rem 0; font-size: .875rem }
@media (max-width: 500px) { .classes, button { font-size: .8rem } .bar { width: auto }
  .classes :is(th, td), button { padding-inline: .25rem } }
@media print { .tall { max-height: none } }
"""

_SCRIPT = """
for (const head of document.querySelectorAll('.classes thead th')) {
  head.firstElementChild.addEventListener('click', () => {
    const was = head.getAttribute('aria-sort');
    const first = head.cellIndex < 2 ? 'ascending' : 'descending';  // the best class first
    const order = !was ? first : was === 'ascending' ? 'descending' : 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const body = head.closest('table').tBodies[0];
    const compare = (a, b) => {
      [a, b] = [a, b].map(row => row.cells[head.cellIndex]);
      if (a.dataset.value === undefined)
        return sign * a.textContent.localeCompare(b.textContent, 'en', {numeric: true});
      if (a.dataset.value === '' || b.dataset.value === '')  // what has no number comes last
        return (a.dataset.value === '') - (b.dataset.value === '');
      return sign * (a.dataset.value - b.dataset.value);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""

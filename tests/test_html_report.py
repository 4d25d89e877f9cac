"""The web page of an evaluation, as a parser and a browser find it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from PIL import Image

from psp_jax.data.labels import LabelSpace, label_space
from psp_jax.metrics import scores as scores_of
from psp_jax.report.html import Shown, render

NASTY = '<b>&"'
VOID = {'meta', 'link', 'img', 'br'}
FACTS = {'checkpoint': '/runs/a/checkpoints/7', 'scales': '0.5, 1', NASTY: f'x{NASTY}y'}


class Node:
    def __init__(self, tag, attrs=()):
        self.tag, self.attrs, self.children = tag, dict(attrs), []

    @property
    def text(self):
        return ''.join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag, name=''):
        """The elements below of this tag and class, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                own = (child.attrs.get('class') or '').split()
                found += [child] if child.tag == tag and (not name or name in own) else []
                found += child.all(tag, name)
        return found


class Parser(HTMLParser):
    """A tree of the page; every element must be closed in turn."""

    def __init__(self, page):
        super().__init__()
        self.open = [Node('root')]
        self.feed(page)
        self.close()
        assert len(self.open) == 1, f'not closed: {[n.tag for n in self.open[1:]]}'

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f'<{tag}> has an attribute twice: {attrs}'
        node = Node(tag, attrs)
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f'</{tag}> closes something else'

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page):
    return Parser(page).open[0]


def evaluation(classes, seed=0, names=None):
    """(scores, confusion, space) of made-up counts; some classes are rare or absent."""
    rng = np.random.default_rng(seed)
    confusion = rng.integers(0, 50, (classes, classes)) * (rng.random((classes, classes)) < 0.3)
    confusion += np.diag(rng.integers(0, 2000, classes))
    if classes > 3:
        confusion[2] = confusion[:, 2] = 0  # neither labelled nor predicted
        confusion[3] = 0  # predicted only
    space = label_space(str(classes))
    if names:
        space = LabelSpace(tuple(names), space.colors)
    scores = {'step': 700, 'protocol': 'whole', 'split': 'val', 'images': 12}
    scores |= scores_of(confusion, space.names) | {'loss': 0.51234, 'seconds': 3.25}
    return scores, confusion, space


def example(height, width, classes, seed=0, labelled=True):
    """A smooth picture with a label, some of it ignored, and a prediction that is partly wrong."""
    rng = np.random.default_rng(seed)

    def blobs(high, shape, interpolation):
        return cv2.resize(
            rng.integers(0, high, shape, np.uint8), (width, height), None, 0, 0, interpolation
        )

    image = blobs(256, (9, 16, 3), cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    label = blobs(classes, (6, 8), cv2.INTER_NEAREST)
    prediction = np.where(blobs(10, (20, 30), cv2.INTER_NEAREST) < 2, (label + 1) % classes, label)
    label[: height // 8] = 255
    return Shown(
        'best',
        f'val/{seed}.png',
        0.4321,
        image,
        label if labelled else None,
        prediction.astype(np.uint8),
    )


def decoded(img):
    kind, data = re.fullmatch(r'data:image/(png|jpeg);base64,(.+)', img.attrs['src']).groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == kind.upper()
    assert (img.attrs['width'], img.attrs['height']) == tuple(map(str, picture.size))
    return picture


CASES = {
    'one class': (1, [example(30, 40, 1)]),
    'no images': (11, []),
    'no labels': (11, [example(30, 40, 11, labelled=False)._replace(miou=None)]),
    'names in the matrix': (25, [example(50, 30, 25)]),
    'matrix as a picture': (26, [example(1, 1, 26), example(300, 900, 26)]),
    'most classes': (255, [example(40, 40, 255, seed) for seed in range(3)]),
}


@pytest.mark.parametrize('case', CASES)
def test_a_page_is_well_formed_and_needs_nothing_beside_itself(case):
    classes, shown = CASES[case]
    scores, confusion, space = evaluation(classes)
    page = render(scores, confusion, shown, space, FACTS)
    assert page.startswith('<!DOCTYPE html>')
    root = parse(page)

    def walk(node):
        for child in node.children:
            if isinstance(child, Node):
                yield child
                yield from walk(child)

    for node in walk(root):
        assert not {'srcset', 'action', 'data', 'poster', 'background'} & node.attrs.keys()
        for name in {'src', 'href', 'xlink:href'} & node.attrs.keys():
            assert node.attrs[name].startswith('data:'), node.attrs[name]
        assert node.tag not in ('iframe', 'object', 'embed', 'base')
    rest = re.sub(r'data:image/\w+;base64,[A-Za-z0-9+/=]+', '', page)
    for word in ('http', '//', 'url(', '@import', 'fetch(', 'XMLHttp', 'import('):
        assert word not in rest.replace(' // ', ''), word
    assert {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'} in [
        n.attrs for n in root.all('meta')
    ]
    assert 'prefers-color-scheme: dark' in root.all('style')[0].text

    [table] = root.all('table', 'classes')
    assert len(table.all('tbody')[0].all('tr')) == classes
    assert len(root.all('table', 'matrix')) == (classes <= 25)
    assert len(root.all('article')) == len(shown)
    labelled = [s.label is not None for s in shown]
    pictures = [len(article.all('img')) for article in root.all('article')]
    assert pictures == [4 if has else 2 for has in labelled]
    for img in root.all('img'):
        assert max(decoded(img).size) <= 640 and img.attrs['alt']


def test_numbers_are_those_of_the_scores():
    scores, confusion, space = evaluation(11)
    scores |= {'challenge_score': 0.61284, 'category_mIoU': 0.8}
    root = parse(render(scores, confusion, [], space, FACTS))

    got = {
        n.all('dt')[0].text: n.all('dd')[0].text for n in root.all('dl', 'numbers')[0].all('div')
    }
    assert got == {
        'mIoU': f'{scores["mIoU"]:.2%}',
        'mIoU, all classes': f'{scores["mIoU_all"]:.2%}',
        'mean accuracy': f'{scores["mAcc"]:.2%}',
        'pixel accuracy': f'{scores["allAcc"]:.2%}',
        'challenge score': '61.28%',
        'category mIoU': '80.00%',
        'loss': '0.5123',
    }
    facts = root.all('dl', 'facts')[0].all('div')
    assert {n.all('dt')[0].text: n.all('dd')[0].text for n in facts} == FACTS
    assert {'700', 'val'} <= set(root.all('h1')[0].text.split())

    total = confusion.sum()
    rows = root.all('table', 'classes')[0].all('tbody')[0].all('tr')
    for i, (row, c) in enumerate(zip(rows, scores['classes'], strict=True)):
        shares = [c['iou'], c['acc'], confusion[i].sum() / total]
        texts = ['–' if s is None else f'{100 * s:.2f}' for s in shares]
        number, iou, acc, pixels = row.all('td')
        assert row.all('th')[0].text == space.names[i] and number.text == str(i)
        assert [iou.text, acc.text, pixels.text] == texts
        values = [float(n.attrs['data-value'] or 'nan') for n in (iou, acc, pixels)]
        np.testing.assert_allclose(values, [np.nan if s is None else s for s in shares])
        color = bytes(space.colors[i]).hex()
        assert row.all('i')[0].attrs['style'] == f'background:#{color}'
    assert rows[2].all('td')[1].text == '–'  # a class that does not occur


def test_what_is_not_there_is_not_shown():
    scores, confusion, space = evaluation(4)
    confusion[:] = 0
    scores |= scores_of(confusion, space.names)
    del scores['loss']
    root = parse(render(scores, confusion, [], space, {}))
    text = root.all('main')[0].text
    assert not any(word in text for word in ('loss', 'challenge', 'category', 'Images', 'nan'))
    assert not root.all('dl', 'facts') and not root.all('ol')
    assert all(row.all('td')[1].text == '–' for row in root.all('tbody')[0].all('tr'))


@pytest.mark.parametrize('classes', [7, 40])
def test_the_largest_confusions_are_those_of_a_plain_count(classes):
    scores, confusion, space = evaluation(classes, seed=3)
    root = parse(render(scores, confusion, [], space, FACTS))
    shares = []
    for i in range(classes):
        labelled = sum(int(n) for n in confusion[i])
        for j in range(classes):
            if i != j and confusion[i, j]:
                pair = f'{space.names[i]} → {space.names[j]}'
                shares.append((int(confusion[i, j]) / labelled, pair))
    shares.sort(key=lambda entry: -entry[0])
    lines = [line.text for line in root.all('ol')[0].all('li')]
    assert [line.rpartition(': ')[2] for line in lines] == [f'{s:.2%}' for s, _ in shares[:10]]
    assert all(f'{pair}: {s:.2%}' in lines for s, pair in shares[:10] if s > min(shares[:11])[0])


def test_both_confusion_matrices_show_rows_of_shares():
    _, confusion, _ = evaluation(25, seed=1)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    scores, _, space = evaluation(25, seed=1)
    root = parse(render(scores, confusion, [], space, FACTS))
    rows = root.all('table', 'matrix')[0].all('tbody')[0].all('tr')
    got = [[int(cell.text or 0) for cell in row.all('td')] for row in rows]
    np.testing.assert_array_equal(got, np.round(100 * shares))
    assert [row.all('th')[0].text for row in rows] == list(space.names)
    heads = root.all('table', 'matrix')[0].all('thead')[0].all('th')
    assert [head.text for head in heads] == list(space.names)

    scores, confusion, space = evaluation(150, seed=1)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    root = parse(render(scores, confusion, [], space, FACTS))
    pixels = np.asarray(decoded(root.all('img')[0]), float)
    assert pixels.shape == (150, 150, 4)
    np.testing.assert_allclose((pixels[..., 3] / 255) ** 2, shares, atol=0.004)
    seen = pixels[..., 3] > 0
    blue = pixels[..., 2] > pixels[..., 0]
    np.testing.assert_array_equal(blue[seen], np.eye(150, dtype=bool)[seen])


def test_names_are_text_wherever_they_stand():
    names = [NASTY, '</table><script>alert(1)</script>', "'x' onload='y'"]
    scores, confusion, space = evaluation(3, names=names)
    confusion[:] = 5
    shown = [example(20, 30, 3)._replace(title=NASTY, name=NASTY), example(20, 30, 3)]
    shown[1] = shown[1]._replace(name='not \udcff Unicode')
    scores['split'] = NASTY
    page = render(scores, confusion, shown, space, FACTS)
    page.encode()
    root = parse(page)
    assert not root.all('b') and len(root.all('script')) == 1
    assert NASTY not in page and escape(NASTY) in page
    rows = root.all('table', 'classes')[0].all('tbody')[0].all('tr')
    assert [row.all('th')[0].text for row in rows] == names
    article = root.all('article')[0]
    assert article.all('p')[0].text == NASTY and article.all('h3')[0].text.startswith(NASTY)
    assert [line.text for line in article.all('ul', 'legend')[0].all('li')] == names
    assert article.all('img')[0].attrs['alt'].startswith(NASTY)


@pytest.mark.parametrize('size', [(64, 96), (360, 480)], ids=str)
def test_pictures_show_label_prediction_and_errors(size):
    scores, confusion, space = evaluation(5)
    shown = example(*size, 5)
    root = parse(render(scores, confusion, [shown], space, FACTS))
    image, label, prediction, error = (
        np.asarray(decoded(img).convert('RGB'), int) for img in root.all('article')[0].all('img')
    )
    assert np.abs(image - shown.image).mean() < 12
    valid = shown.label != 255
    np.testing.assert_array_equal(label[valid], space.colors[shown.label[valid]])
    np.testing.assert_array_equal(prediction, space.colors[shown.prediction])
    assert len(np.unique(label[~valid], axis=0)) == 1

    def inner(mask):  # what JPEG compresses runs over borders a little
        around = np.ones((1, 1) if size[1] < 320 else (17, 17), np.uint8)
        return cv2.erode(mask.astype(np.uint8), around).astype(bool)

    red, green, blue = np.moveaxis(error, -1, 0)
    wrong = valid & (shown.label != shown.prediction)
    assert inner(wrong).any() and (red - np.maximum(green, blue))[inner(wrong)].min() > 100
    right = inner(valid & ~wrong)
    assert np.ptp(error, -1)[right].max() < 30
    grey = shown.image @ [0.299, 0.587, 0.114]
    assert np.corrcoef(error[right].mean(-1), grey[right])[0, 1] > 0.95
    assert error[inner(~valid)].max() < 60 < 80 < error[right].min()

    article = root.all('article')[0]
    assert article.all('h3')[0].text == 'best mIoU 43.21%'
    present = sorted(set(np.unique(shown.label[valid])) | set(np.unique(shown.prediction)))
    legend = [line.text for line in article.all('ul', 'legend')[0].all('li')]
    assert legend == [space.names[i] for i in present]


def test_nine_large_images_stay_below_two_megabytes():
    scores, confusion, space = evaluation(19)
    shown = [example(1024, 2048, 19, seed) for seed in range(9)]
    page = render(scores, confusion, shown, space, FACTS)
    assert 100_000 < len(page.encode()) < 2_000_000
    assert {decoded(img).size for img in parse(page).all('img')} == {(640, 320)}


# The page in frames as wide as a telephone and a desktop; what is found becomes the text of <pre>.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="390" height="9000" style="border:0" srcdoc="{page}"></iframe>
<iframe width="1280" height="9000" style="border:0" srcdoc="{page}"></iframe><pre></pre><script>
addEventListener('load', () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const [table] = page.getElementsByClassName('classes');
    const column = name => [...table.tHead.rows[0].cells].find(c => c.textContent === name);
    const click = name => {{
      const button = column(name).querySelector('button');
      button.focus();
      button.click();
      return {{
        focused: page.activeElement === button,
        sort: [...table.tHead.rows[0].cells].map(c => c.getAttribute('aria-sort')),
        ids: [...table.tBodies[0].rows].map(row => Number(row.cells[0].textContent)),
      }};
    }};
    return {{
      seen: frame.contentWindow.innerWidth, width: root.clientWidth, needed: root.scrollWidth,
      broken: [...page.images].filter(image => !image.naturalWidth).length,
      clicks: ['IoU', 'IoU', 'pixels', 'class', '#'].map(click),
    }};
  }});
  document.querySelector('pre').textContent = JSON.stringify(found);
}});
</script>"""


@pytest.mark.parametrize('classes', [12, 150])
def test_a_browser_sorts_the_table_and_never_scrolls_sideways(classes, tmp_path):
    browsers = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip(f'needs one of {", ".join(browsers)}')
    names = [f'class {i}' for i in range(classes - 2)] + ['x' * 60, 'words ' * 12 + NASTY]
    scores, confusion, space = evaluation(classes, names=names)
    shown = [example(300, 600, 12), example(300, 200, 12)._replace(name='long/' * 40 + 'y' * 90)]
    facts = FACTS | {'data': 'z' * 200}
    page = render(scores, confusion, shown, space, facts)
    path = tmp_path / 'harness.html'
    path.write_text(HARNESS.format(page=escape(page)), encoding='utf-8')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
    command += [f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=10000']
    run = subprocess.run(
        [*command, '--dump-dom', path.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre>(.+)</pre>', run.stdout)
    assert found, run.stderr

    def ordered(key, descending):
        """Class ids by a plain sort; classes without a number come last."""
        numbered = [c for c in scores['classes'] if c[key] is not None]
        numbered.sort(key=lambda c: -c[key] if descending else c[key])
        return [c['id'] for c in numbered] + [c['id'] for c in scores['classes'] if c[key] is None]

    def values(ids, key):  # equal values may stand in either order
        return [scores['classes'][i][key] for i in ids]

    for frame, width in zip(json.loads(found[1].replace('&amp;', '&')), (390, 1280), strict=True):
        assert frame['seen'] == width
        assert frame['needed'] <= frame['width'] == width, f'overflows {width} pixels'
        assert frame['broken'] == 0
        by_iou, back, by_pixels, by_name, by_id = frame['clicks']
        assert all(click['focused'] for click in frame['clicks'])
        assert by_iou['sort'] == [None, None, 'descending', None, None]
        assert values(by_iou['ids'], 'iou') == values(ordered('iou', True), 'iou')
        assert by_iou['ids'][-1] == 2  # neither labelled nor predicted
        assert back['sort'] == [None, None, 'ascending', None, None]
        assert values(back['ids'], 'iou') == values(ordered('iou', False), 'iou')
        assert back['ids'][-1] == 2
        assert by_pixels['sort'] == [None, None, None, None, 'descending']
        assert values(by_pixels['ids'], 'pixels') == values(ordered('pixels', True), 'pixels')
        assert by_name['sort'] == [None, 'ascending', None, None, None]
        assert by_name['ids'] == [*range(classes - 2), classes - 1, classes - 2]
        assert by_id['ids'] == list(range(classes))

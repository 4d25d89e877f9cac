"""The report of an evaluation as a parser and a browser see it."""

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
from psp_jax.report.pictures import Panel

NASTY = '<b>&"'
FACTS = {'checkpoint': '/runs/a/checkpoints/7', NASTY: f'x{NASTY}y'}


class Node:
    def __init__(self, tag, attrs=()):
        self.tag, self.attrs, self.children = tag, dict(attrs), []

    @property
    def text(self):
        parts = (c if isinstance(c, str) else c.text for c in self.children)
        return re.sub(r'\s+', ' ', ''.join(parts)).strip()

    def all(self, tag='', name=''):
        """The elements below with this tag and class, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                classes = (child.attrs.get('class') or '').split()
                wanted = tag in ('', child.tag) and (not name or name in classes)
                found += [child] * wanted + child.all(tag, name)
        return found


class Parser(HTMLParser):
    """Builds a tree of the page; fails if an element is not closed."""

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
        if tag not in ('meta', 'link', 'img'):
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f'</{tag}> closes something else'

    def handle_data(self, data):
        self.open[-1].children.append(data)


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


def example(height, width, classes, seed=0, title='best', name='val/1.png'):
    """A smooth image with a label, some of it ignored, and a prediction that is partly wrong."""
    rng = np.random.default_rng(seed)

    def blobs(high, shape, interpolation):
        small = rng.integers(0, high, shape, np.uint8)
        return cv2.resize(small, (width, height), interpolation=interpolation)

    image = blobs(256, (9, 16, 3), cv2.INTER_CUBIC)
    label = blobs(classes, (6, 8), cv2.INTER_NEAREST)
    wrong = blobs(10, (20, 30), cv2.INTER_NEAREST) < 2
    prediction = np.where(wrong, (label + 1) % classes, label).astype(np.uint8)
    label[: height // 8] = 255
    return Shown(title, name, 0.4321, Panel(image, label, prediction))


def parsed(classes, shown=(), seed=0):
    scores, confusion, space = evaluation(classes, seed)
    return Parser(render(scores, confusion, shown, space, FACTS)).open[0]


def rows(table):
    return table.all('tbody')[0].all('tr')


def decoded(img):
    kind, data = re.fullmatch(r'data:image/(png|jpeg);base64,(.+)', img.attrs['src']).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == kind.upper()
    assert (img.attrs['width'], img.attrs['height']) == tuple(map(str, image.size))
    return image


CASES = {
    'one class': (1, [example(30, 40, 1)]),
    'no images': (11, []),
    'names in the matrix': (25, [example(50, 30, 25)]),
    'matrix as an image': (26, [example(1, 1, 26), example(300, 900, 26)]),
}


@pytest.mark.parametrize('case', CASES)
def test_a_page_is_well_formed_and_loads_nothing(case):
    classes, shown = CASES[case]
    scores, confusion, space = evaluation(classes)
    page = render(scores, confusion, shown, space, FACTS)
    assert page.startswith('<!DOCTYPE html>')
    root = Parser(page).open[0]
    for node in root.all():
        assert node.tag not in ('iframe', 'object', 'embed', 'base')
        for name in {'src', 'href'} & node.attrs.keys():
            assert node.attrs[name].startswith('data:'), node.attrs[name]
    rest = re.sub(r'data:image/\w+;base64,[A-Za-z0-9+/=]+', '', page)
    for word in ('http', 'url(', '@import', 'fetch(', 'import('):
        assert word not in rest

    assert len(rows(root.all('table', 'classes')[0])) == classes
    assert len(root.all('table', 'matrix')) == (classes <= 25)
    assert [len(article.all('img')) for article in root.all('article')] == [4] * len(shown)
    for img in root.all('img'):
        assert max(decoded(img).size) <= 640 and img.attrs['alt']


def test_numbers_are_those_of_the_scores():
    scores, confusion, space = evaluation(11)
    scores |= {'challenge_score': 0.61284, 'category_mIoU': 0.8}
    root = Parser(render(scores, confusion, [], space, FACTS)).open[0]

    def terms(name):
        found = root.all('dl', name)[0].all('div')
        return {n.all('dt')[0].text: n.all('dd')[0].text for n in found}

    assert terms('numbers') == {
        'mIoU': f'{scores["mIoU"]:.2%}',
        'mIoU, all classes': f'{scores["mIoU_all"]:.2%}',
        'mean accuracy': f'{scores["mAcc"]:.2%}',
        'pixel accuracy': f'{scores["allAcc"]:.2%}',
        'challenge score': '61.28%',
        'category mIoU': '80.00%',
        'loss': '0.5123',
    }
    assert terms('facts') == FACTS
    assert root.all('h1')[0].text == 'Evaluation of step 700 on val'

    for i, row in enumerate(rows(root.all('table', 'classes')[0])):
        c = scores['classes'][i]
        shares = [c['iou'], c['acc'], confusion[i].sum() / confusion.sum()]
        number, *cells = row.all('td')
        assert row.all('th')[0].text == space.names[i] and number.text == str(i)
        assert [x.text for x in cells] == ['–' if s is None else f'{100 * s:.2f}' for s in shares]
        values = [float(x.attrs['data-value'] or 'nan') for x in cells]
        np.testing.assert_allclose(values, [np.nan if s is None else s for s in shares])
        assert row.all('i')[0].attrs['style'] == f'background:#{bytes(space.colors[i]).hex()}'


def test_an_evaluation_without_labelled_pixels_has_a_page():
    scores, confusion, space = evaluation(4)
    confusion[:] = 0
    scores |= scores_of(confusion, space.names)
    root = Parser(render(scores, confusion, [], space, {})).open[0]
    text = root.all('main')[0].text
    assert not any(word in text for word in ('challenge', 'category', 'Images', 'nan'))
    assert all(row.all('td')[1].text == '–' for row in rows(root.all('table', 'classes')[0]))


@pytest.mark.parametrize('classes', [7, 40])
def test_the_largest_confusions_are_those_of_a_plain_count(classes):
    _, confusion, space = evaluation(classes, seed=3)
    shares = []
    for i in range(classes):
        for j in range(classes):
            if i != j and confusion[i, j]:
                pair = f'{space.names[i]} → {space.names[j]}'
                shares.append((confusion[i, j] / confusion[i].sum(), pair))
    shares.sort(key=lambda entry: -entry[0])
    lines = [line.text for line in parsed(classes, seed=3).all('ol')[0].all('li')]
    assert [line.rpartition(': ')[2] for line in lines] == [f'{s:.2%}' for s, _ in shares[:10]]
    assert all(f'{pair}: {s:.2%}' in lines for s, pair in shares[:10] if s > shares[:11][-1][0])


def test_the_confusion_matrix_shows_rows_of_shares():
    _, confusion, space = evaluation(25)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    [table] = parsed(25).all('table', 'matrix')
    cells = [row.all('td') for row in rows(table)]
    got = [[int(cell.text or 0) for cell in row] for row in cells]
    np.testing.assert_array_equal(got, np.round(100 * shares))
    assert [row.all('th')[0].text for row in rows(table)] == list(space.names)
    assert [head.text for head in table.all('thead')[0].all('th')] == list(space.names)
    right = [['right' in cell.attrs['class'].split() for cell in row] for row in cells]
    np.testing.assert_array_equal(right, np.eye(25, dtype=bool))


def test_names_are_text_everywhere():
    names = [NASTY, '</table><script>alert(1)</script>', "'x' onload='y'"]
    scores, confusion, space = evaluation(3, names=names)
    confusion[:] = 5
    scores['split'] = NASTY
    shown = [
        example(20, 30, 3, title=NASTY, name=NASTY),
        example(20, 30, 3, name='not \udcff Unicode'),
    ]
    page = render(scores, confusion, shown, space, FACTS)
    page.encode()
    root = Parser(page).open[0]
    assert not root.all('b') and len(root.all('script')) == 1
    assert [row.all('th')[0].text for row in rows(root.all('table', 'classes')[0])] == names
    article = root.all('article')[0]
    assert article.all('p')[0].text == NASTY
    assert article.all('h3')[0].text == f'{NASTY} mIoU 43.21%'
    assert [line.text for line in article.all('ul', 'legend')[0].all('li')] == names
    assert article.all('img')[0].attrs['alt'] == f'{NASTY}, image'


@pytest.mark.parametrize('size', [(64, 96), (360, 480)], ids=str)
def test_an_article_shows_the_image_label_and_prediction(size):
    shown = example(*size, 5)
    image, label, prediction = shown.panel
    [article] = parsed(5, [shown]).all('article')
    found = [np.asarray(decoded(img).convert('RGB'), int) for img in article.all('img')[:3]]
    assert np.abs(found[0] - image).mean() < 12  # a JPEG if it is large
    space, valid = label_space('5'), label != 255
    np.testing.assert_array_equal(found[1][valid], space.colors[label[valid]])
    np.testing.assert_array_equal(found[2], space.colors[prediction])
    present = sorted(set(np.unique(label[valid])) | set(np.unique(prediction)))
    legend = [line.text for line in article.all('ul', 'legend')[0].all('li')]
    assert legend == [space.names[i] for i in present]


def test_nine_large_images_stay_below_two_megabytes():
    scores, confusion, space = evaluation(19)
    shown = [example(1024, 2048, 19, seed) for seed in range(9)]
    assert len(render(scores, confusion, shown, space, FACTS).encode()) < 2_000_000


# The page in frames as wide as a telephone and a desktop; the results become the text of <pre>.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="390" height="12000" style="border:0" srcdoc="{page}"></iframe>
<iframe width="1280" height="12000" style="border:0" srcdoc="{page}"></iframe><pre></pre><script>
addEventListener('load', () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const [table] = page.getElementsByClassName('classes');
    const heads = [...table.tHead.rows[0].cells];
    const click = name => {{
      heads.find(c => c.textContent === name).querySelector('button').click();
      return {{
        sort: heads.map(c => c.getAttribute('aria-sort')),
        ids: [...table.tBodies[0].rows].map(row => Number(row.cells[0].textContent)),
      }};
    }};
    return {{
      width: root.clientWidth, needed: root.scrollWidth,
      broken: [...page.images].filter(image => !image.naturalWidth).length,
      clicks: ['IoU', 'IoU', 'class', '#'].map(click),
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
    shown = [example(300, 600, 12), example(300, 200, 12, name='long/' * 40 + 'y' * 90)]
    page = render(scores, confusion, shown, space, FACTS | {'data': 'z' * 200})
    path = tmp_path / 'harness.html'
    path.write_text(HARNESS.format(page=escape(page)), encoding='utf-8')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
    command += [f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=10000']
    run = subprocess.run(
        [*command, '--dump-dom', path.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre>(.+)</pre>', run.stdout)
    assert found, run.stderr

    iou = [c['iou'] for c in scores['classes']]
    best_first = sorted((i for i in iou if i is not None), reverse=True)
    missing = [None] * iou.count(None)
    for frame, width in zip(json.loads(found[1]), (390, 1280), strict=True):
        assert frame['needed'] <= frame['width'] == width
        assert frame['broken'] == 0
        best, worst, by_name, by_id = frame['clicks']
        assert best['sort'] == [None, None, 'descending', None, None]
        assert [iou[i] for i in best['ids']] == best_first + missing  # no number comes last
        assert worst['sort'] == [None, None, 'ascending', None, None]
        assert [iou[i] for i in worst['ids']] == best_first[::-1] + missing
        assert by_name['ids'] == [*range(classes - 2), classes - 1, classes - 2]
        assert by_id['ids'] == list(range(classes))

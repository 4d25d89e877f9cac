"""The report of an evaluation as a parser and a browser see it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import escape
from xml.etree import ElementTree

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


def evaluation(classes, names=None):
    """(scores, confusion, space) of made-up counts; some classes are rare or absent."""
    rng = np.random.default_rng(3)
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


def example(height, width, classes, title='best', name='val/1.png'):
    """A smooth image with a label, some of it ignored, and a prediction that is partly wrong."""
    rng = np.random.default_rng(0)

    def blobs(high, shape, interpolation):
        small = rng.integers(0, high, shape, np.uint8)
        return cv2.resize(small, (width, height), interpolation=interpolation)

    image = blobs(256, (9, 16, 3), cv2.INTER_CUBIC)
    label = blobs(classes, (6, 8), cv2.INTER_NEAREST)
    wrong = blobs(10, (20, 30), cv2.INTER_NEAREST) < 2
    prediction = np.where(wrong, (label + 1) % classes, label).astype(np.uint8)
    label[: height // 8] = 255
    return Shown(title, name, 0.4321, Panel(image, label, prediction))


def parse(page):
    """The tree of a page without style and script; fails if an element is not closed."""
    return ElementTree.fromstring(
        re.sub(r'<(style|script)>.*?</\1>', r'<\1></\1>', page, flags=re.S)
    )


def text(node):
    return ' '.join(''.join(node.itertext()).split())


def texts(node, path):
    return [text(found) for found in node.findall(f'.//{path}')]


def rows(root, table):
    return root.findall(f'.//table[@class="{table}"]/tbody/tr')


def decoded(img):
    kind, data = re.fullmatch(r'data:image/(png|jpeg);base64,(.+)', img.get('src')).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == kind.upper()
    assert (img.get('width'), img.get('height')) == tuple(map(str, image.size))
    return image


@pytest.mark.parametrize(
    'classes, sizes', [(1, [(30, 40)]), (11, []), (25, [(50, 30)]), (26, [(1, 1), (300, 900)])]
)
def test_a_page_is_well_formed_and_loads_nothing(classes, sizes):
    shown = [example(*size, classes) for size in sizes]
    scores, confusion, space = evaluation(classes)
    page = render(scores, confusion, shown, space, FACTS)
    assert page.startswith('<!DOCTYPE html>')
    root = parse(page)
    for node in root.iter():
        for name in {'src', 'href'} & set(node.keys()):
            assert node.get(name).startswith('data:')
    rest = re.sub(r'data:image/\w+;base64,[A-Za-z0-9+/=]+', '', page)
    assert not re.search(r'http|url\(|@import|fetch\(|import\(', rest)

    assert len(rows(root, 'classes')) == classes
    assert len(rows(root, 'matrix')) == (classes if classes <= 25 else 0)
    assert [len(a.findall('.//img')) for a in root.iter('article')] == [4] * len(shown)
    for img in root.iter('img'):
        assert max(decoded(img).size) <= 640 and img.get('alt')


def test_numbers_are_those_of_the_scores():
    scores, confusion, space = evaluation(11)
    scores |= {'challenge_score': 0.61284, 'category_mIoU': 0.8}
    root = parse(render(scores, confusion, [], space, FACTS))

    def terms(name):
        found = root.findall(f'.//dl[@class="{name}"]/div')
        return {text(n.find('dt')): text(n.find('dd')) for n in found}

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
    assert texts(root, 'h1') == ['Evaluation of step 700 on val']
    for i, row in enumerate(rows(root, 'classes')):
        c = scores['classes'][i]
        shares = c['iou'], c['acc'], confusion[i].sum() / confusion.sum()
        cells = ['–' if s is None else f'{100 * s:.2f}' for s in shares]
        assert [text(cell) for cell in row] == [str(i), space.names[i], *cells]
        color = bytes(space.colors[i]).hex()
        assert row.find('.//i').get('style') == f'background:#{color}'


def test_an_evaluation_without_labelled_pixels_has_a_page():
    scores, confusion, space = evaluation(4)
    confusion[:] = 0
    root = parse(render(scores | scores_of(confusion, space.names), confusion, [], space, {}))
    assert all([text(cell) for cell in row][2:4] == ['–', '–'] for row in rows(root, 'classes'))


@pytest.mark.parametrize('classes', [7, 40])
def test_the_largest_confusions_are_those_of_a_plain_count(classes):
    scores, confusion, space = evaluation(classes)
    shares = []
    for i in range(classes):
        for j in range(classes):
            if i != j and confusion[i, j]:
                pair = f'{space.names[i]} → {space.names[j]}'
                shares.append((confusion[i, j] / confusion[i].sum(), pair))
    shares.sort(key=lambda entry: -entry[0])
    lines = texts(parse(render(scores, confusion, [], space, FACTS)), 'ol/li')
    assert [line.rpartition(': ')[2] for line in lines] == [f'{s:.2%}' for s, _ in shares[:10]]
    assert all(f'{pair}: {s:.2%}' in lines for s, pair in shares[:10] if s > shares[:11][-1][0])


def test_the_confusion_matrix_shows_rows_of_shares():
    scores, confusion, space = evaluation(25)
    root = parse(render(scores, confusion, [], space, FACTS))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    for i, row in enumerate(rows(root, 'matrix')):
        name, *cells = row
        assert text(name) == space.names[i]
        assert [int(text(cell) or 0) for cell in cells] == np.round(100 * shares[i]).tolist()
        assert [cell.get('class').startswith('right') for cell in cells].index(True) == i


def test_names_are_text_everywhere():
    names = [NASTY, '</table><script>alert(1)</script>', "'x' onload='y'"]
    scores, confusion, space = evaluation(3, names)
    confusion[:] = 5
    scores['split'] = NASTY
    shown = [example(20, 30, 3, NASTY, NASTY), example(20, 30, 3, name='not \udcff Unicode')]
    page = render(scores, confusion, shown, space, FACTS)
    page.encode()
    assert page.count('<script>') == 1
    root = parse(page)
    assert [text(row[1]) for row in rows(root, 'classes')] == names
    article = root.find('.//article')
    assert text(article[0]) == f'{NASTY} mIoU 43.21%' and text(article[1]) == NASTY
    assert texts(article, 'ul/li') == names
    assert article.find('.//img').get('alt') == f'{NASTY}, image'


@pytest.mark.parametrize('size', [(64, 96), (360, 480)], ids=str)
def test_an_article_shows_the_image_label_and_prediction(size):
    shown, (scores, confusion, space) = example(*size, 5), evaluation(5)
    image, label, prediction = shown.panel
    article = parse(render(scores, confusion, [shown], space, FACTS)).find('.//article')
    found = [np.asarray(decoded(img).convert('RGB'), int) for img in article.iter('img')]
    assert np.abs(found[0] - image).mean() < 12  # a JPEG if it is large
    valid = label != 255
    np.testing.assert_array_equal(found[1][valid], space.colors[label[valid]])
    np.testing.assert_array_equal(found[2], space.colors[prediction])
    present = np.union1d(label[valid], prediction)
    assert texts(article, 'ul/li') == [space.names[i] for i in present]


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
      return [...table.tBodies[0].rows].map(row => Number(row.cells[0].textContent));
    }};
    return {{
      width: root.clientWidth, needed: root.scrollWidth,
      broken: [...page.images].filter(image => !image.naturalWidth).length,
      orders: ['IoU', 'IoU', 'class', '#'].map(click),
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
    scores, confusion, space = evaluation(classes, names)
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
        best, worst, by_name, by_id = frame['orders']
        assert [iou[i] for i in best] == best_first + missing  # no number comes last
        assert [iou[i] for i in worst] == best_first[::-1] + missing
        assert by_name == [*range(classes - 2), classes - 1, classes - 2]
        assert by_id == list(range(classes))

"""The check of a data set, on good sets and on sets that were damaged by hand."""

import os
import re
import shlex
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from psp_jax.command_line import exit_code
from psp_jax.config import default_config
from psp_jax.config_check import load_config
from psp_jax.data.check import __main__ as command
from psp_jax.data.check import judge, read
from psp_jax.data.check.__main__ import check, parse_flags
from psp_jax.data.check.judge import likely_cause, ranges
from psp_jax.data.labels import label_space, label_table
from psp_jax.errors import UserError

# (height, width) of the images of each split
SHAPES = {
    'train': [(24, 32), (20, 30), (24, 32), (40, 28), (24, 32), (24, 32), (22, 24), (24, 32)],
    'val': [(24, 32), (30, 21), (24, 32)],
}
CLASSES = [f'c{i}' for i in range(11)]
VOID = 11  # as stored; the set is like CamVid


def some_label(split, i):
    """Values 0..8 and 11; 9 is in val alone, 10 nowhere."""
    rng = np.random.default_rng([len(split), i])
    label = rng.choice([*range(9), VOID], SHAPES[split][i]).astype(np.uint8)
    if split == 'val':
        label[0, :5] = 9
    return label


def some_image(split, i):
    rng = np.random.default_rng([len(split), i, 1])
    return rng.integers(0, 256, (*SHAPES[split][i], 3), np.uint8)


def make_set(root):
    """A good set in folders, with its lists."""
    for split, shapes in SHAPES.items():
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        lines = []
        for i in range(len(shapes)):
            pair = f'images/{split}/{split} {i}.jpg', f'labels/{split}/{split} {i}.png'
            Image.fromarray(some_image(split, i)).save(root / pair[0])
            Image.fromarray(some_label(split, i)).save(root / pair[1])
            lines.append('\t'.join(pair) + '\n')
        (root / f'{split}.txt').write_text(''.join(lines))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / 'my data'
    make_set(folder)
    return folder


def config_of(root, source='list', **data):
    config = default_config()
    named = (
        ('train.txt', 'val.txt')
        if source == 'list'
        else tuple(f'images/{s},labels/{s}' for s in ('train', 'val'))
    )
    plain = {'source': source, 'root': str(root), 'train': named[0], 'val': named[1]}
    plain |= {'classes': ','.join(CLASSES), 'label_map': '{11: 255}', 'crop': 33, 'threads': 2}
    for key, value in (plain | data).items():
        config.data[key] = value
    return config


def faults_of(capsys, config, *folders):
    """What is printed as faults, {heading: [lines]}, and the error."""
    with pytest.raises(UserError) as error:
        check(config, *folders)
    found = {}
    for block in capsys.readouterr().out.split('\n\n'):
        if block.startswith('Fault'):
            heading, *lines = re.sub(r'\n {6}(?=\S)', ' ', block).splitlines()
            count, heading = re.fullmatch(r'Fault \((\d+)\): (.*)', heading).groups()
            found[heading] = lines
            assert int(count) == len(lines) or '(and ' in lines[-1]
    return found, str(error.value)


def clean(capsys, config, *folders):
    """The text that a check without faults prints."""
    check(config, *folders)
    text = capsys.readouterr().out
    assert text.endswith('no faults\n') and 'Fault' not in text
    return text


def rows_of(text):
    """{title: its numbers} of the table of classes."""
    rows = [re.split(' {2,}', line.strip()) for line in text.split('\n\n')[2].splitlines()[2:]]
    return {re.sub(r'^\d+ ', '', title): cells for title, *cells in rows}


# ---- what there is


@pytest.mark.parametrize('source', ['list', 'dirs'])
def test_a_good_set_is_counted_exactly(root, capsys, source):
    text = clean(capsys, config_of(root, source))
    rows = rows_of(text)
    for column, split in enumerate(SHAPES):
        labels = [some_label(split, i) for i in range(len(SHAPES[split]))]
        pixels = np.concatenate([label.ravel() for label in labels])
        for title, value in [(n, i) for i, n in enumerate(CLASSES)] + [('stored as 11', VOID)]:
            share = 100 * (pixels == value).mean()
            images = sum((label == value).any() for label in labels)
            expected = [f'{share:.2f} %', str(images)] if images else ['-', '-']
            assert rows[title][2 * column : 2 * column + 2] == expected, title
        assert rows['ignored'] == rows['stored as 11']
    assert len(rows) == 13
    # areas 528, 600, 5 x 768, 1120; 630, 2 x 768
    assert re.search(r'^train +8  24x22 to 28x40, median 32x24, 4 different$', text, re.M)
    assert re.search(r'^val +3  21x30 to 32x24, median 32x24, 2 different$', text, re.M)
    assert '11 examples read' in text


def test_a_test_split_of_images_alone_has_no_labels(root, capsys):
    (root / 'test').mkdir()
    for i in range(3):
        Image.fromarray(some_image('train', i)[:, ::-1]).save(root / f'test/{i} x.png')
    text = clean(capsys, config_of(root, 'dirs', test='test'))
    assert re.search(r'^test +3  30x20 to 32x24', text, re.M)
    assert 'test' not in text.split('\n\n')[2]
    (root / 'test/2 x.png').write_bytes(b'')
    faults, _ = faults_of(capsys, config_of(root, 'dirs', test='test'), '', str(root / 'fixed'))
    assert 'test/2 x.png' in faults[read.UNREADABLE][0]
    fixed = (root / 'fixed/test.txt').read_text()
    assert fixed == f'{root}/test/0 x.png\n{root}/test/1 x.png\n'


def test_scenes_are_counted_and_may_not_be_in_two_splits(capsys):
    splits = {'train': '0:6', 'val': '6:8'}
    config = config_of('', 'scenes', classes='scenes', label_map='', **splits)
    assert rows_of(clean(capsys, config))['sky'][1::2] == ['6', '2']
    config.data.val = '5:8'
    faults, error = faults_of(capsys, config)
    assert faults == {judge.LEAKED: ['  train  scene 5 = scene 5 of val']}
    assert error.startswith('1 faults in 1 files: ')
    config.data.update(val='6:8', classes='9')
    faults, _ = faults_of(capsys, config)
    assert any('outside the classes 0..8: 9 in' in heading for heading in faults)


# ---- what is wrong


def damage(root):
    """Plants a fault of each kind in `make_set`'s files; returns {heading: lines}, as printed."""
    pairs = [(f'images/train/train {i}.jpg', f'labels/train/train {i}.png') for i in range(8)]
    images, labels = ([root / pair[k] for pair in pairs] for k in (0, 1))
    images[0].write_bytes(images[0].read_bytes()[:-200])
    Image.fromarray(some_image('train', 2)[:-1]).save(images[2])
    label = some_label('train', 3)
    label[0, :2] = 12
    Image.fromarray(label).save(labels[3])
    images[5].write_bytes((root / 'images/val/val 0.jpg').read_bytes())
    images[6].write_bytes(b'')
    Image.open(labels[7]).convert('RGB').save(labels[7])
    wrong = (
        '12 in 1 of 7 labels; 0..8, 11..12 are stored; name all classes in data.classes in the '
        'order of their ids, or set data.label_map to turn the others into 255'
    )
    return {
        read.UNREADABLE: [
            rf'{pairs[0][0]} cannot be decoded \(image file is truncated .*\)',
            rf'{pairs[6][0]} cannot be decoded \(the file is empty\)',
        ],
        read.SIZES: [f'{pairs[2][0]} is 32x23, {pairs[2][1]} is 32x24'],
        f'Label values of train outside the classes 0..10: {wrong}': [f'{pairs[3][1]}: 12'],
        judge.LEAKED: [f'{pairs[5][0]} = images/val/val 0.jpg of val'],
        read.NO_LABEL: [f'{pairs[7][1]} is a label of mode RGB'],
    }


@pytest.mark.parametrize('source', ['list', 'dirs'])
def test_every_planted_fault_is_found_and_named(root, capsys, source):
    expected = damage(root)
    expected['data.train: correct it, or what it names'] = [
        r'images/train/alone.jpg has no partner of the same name in labels/train'
        if source == 'dirs'
        else r"train.txt:9: 'images/train/alone.jpg' is not `image label` .*"
    ]
    Image.fromarray(some_image('train', 0)).save(root / 'images/train/alone.jpg')
    with open(root / 'train.txt', 'a') as file:
        file.write('images/train/alone.jpg')
    faults, error = faults_of(capsys, config_of(root, source))
    assert faults.keys() == expected.keys()
    for heading, lines in faults.items():
        for line, pattern in zip(lines, expected[heading], strict=True):
            assert re.fullmatch(f'  train  {pattern}', line)
    assert error.startswith('7 faults in 7 files: ') and '\n' not in error


@pytest.mark.parametrize('source', ['list', 'dirs'])
def test_the_fixed_lists_check_clean(root, tmp_path, capsys, source):
    damage(root)
    Image.fromarray(some_image('train', 0)).save(root / 'images/train/train 8.jpg')
    Image.fromarray(some_label('train', 0)).save(root / 'labels/train/train 8.png')
    with open(root / 'train.txt', 'a') as file:
        file.write(2 * 'images/train/train 8.jpg\tlabels/train/train 8.png\n')
    config, fixed = config_of(root, source), tmp_path / 'fixed lists'
    with pytest.raises(UserError, match=rf'{7 if source == "list" else 6} faults in'):
        check(config, '', str(fixed))
    text = capsys.readouterr().out
    names = [path.split('\t')[0] for path in (fixed / 'train.txt').read_text().splitlines()]
    assert names == [f'{root}/images/train/train {i}.jpg' for i in (1, 4, 8)]
    assert len((fixed / 'val.txt').read_text().splitlines()) == 3
    words = shlex.split(text.partition('to be used with\n')[2].split('\n')[0])
    for word in words:
        key, _, value = word.removeprefix('--config.data.').partition('=')
        config.data[key] = value
    assert re.search(r'^train +3 .*\nval +3 ', clean(capsys, config), re.M)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('zero bytes', 'val.txt lists no example'),
        ('missing', 'val.txt does not exist'),
        ('binary', 'val.txt is not a text file in UTF-8'),
    ],
)
def test_of_a_bad_list_the_other_split_is_still_read(root, tmp_path, capsys, change, message):
    path = root / 'val.txt'
    path.unlink()
    if change != 'missing':
        path.write_bytes(b'' if change == 'zero bytes' else b'\xff\x00')
    with pytest.raises(UserError, match='^1 faults in 1 files'):
        check(config_of(root), '', str(tmp_path / 'fixed'))
    text = capsys.readouterr().out
    assert re.search(r'^train +8 ', text, re.M)
    assert f'Fault (1): data.val: correct it, or what it names\n  val    {message}\n' in text
    assert text.partition('used with\n')[2].split('\n')[0].endswith(' --config.data.val=')
    assert os.listdir(tmp_path / 'fixed') == ['train.txt']


@pytest.mark.parametrize(
    ('stored', 'classes', 'label_map', 'cause'),
    [
        # {value: in how many of 100 labels}
        ({**dict.fromkeys(range(150), 30), 0: 95, 150: 2}, 'ade20k', '', 'label_map=minus_one'),
        (dict.fromkeys(range(12), 90), 'camvid', '', "'--config.data.label_map={11:255}'"),
        (dict.fromkeys(range(1, 8), 90), '7', '', 'label_map=minus_one'),
        (dict.fromkeys(range(34), 50), 'cityscapes', '', 'label_map=cityscapes_ids'),
        ({0: 99, 128: 70}, '2', '', "'--config.data.label_map={128:1}'"),
        ({0: 99, 85: 70, 170: 20, 255: 100}, '3', '', "label_map={85:1,170:2}'"),
        ({0: 99, 128: 70, 255: 20}, '3', '', "label_map={128:1,255:2}'"),
        ({**dict.fromkeys(range(7), 90), 9: 2}, '7', '', 'so few'),
        ({**dict.fromkeys(range(7), 90), 9: 20}, '7', '', '0..6, 9 are stored'),
        ({**dict.fromkeys(range(7), 90), 256: 90}, '7', '', 'ids of instances'),
        ({**dict.fromkeys(range(9), 90)}, '7', 'minus_one', 'data.label_map to turn the others'),
    ],
)
def test_the_likely_cause_of_wrong_values_is_named(stored, classes, label_map, cause):
    data = ConfigDict({'classes': classes, 'label_map': label_map})
    count, table = len(label_space(classes).names), [*label_table(label_map), 256]
    wrong = [v for v in stored if table[v] >= count and table[v] != 255]
    assert cause in likely_cause(Counter(stored), wrong, 100, data)


def test_rare_and_frequent_wrong_values_are_separate_faults(root, capsys):
    for i in range(40):
        label = some_label('train', 0)
        label[0, 0] = 12 if i == 7 else 0
        Image.fromarray(label).save(root / f'labels/train/more {i}.png')
        Image.fromarray(np.roll(some_image('train', 0), i + 1)).save(
            root / f'images/train/more {i}.png'
        )
    faults, error = faults_of(capsys, config_of(root, 'dirs', label_map='', val=''))
    (void, of_void), (rare, of_rare) = faults.items()
    assert '11 in 48 of 48 labels; ' in void and '{11:255}' in void and len(of_void) == 21
    assert '12 in 1 of 48 labels; so few' in rare
    assert of_rare == ['  train  labels/train/more 7.png: 12']
    assert error.startswith('49 faults in 48 files')


@pytest.mark.parametrize(
    ('values', 'classes', 'label_map', 'said'),
    [
        ((0, 255), '2', '', "Set '--config.data.label_map={255:1}'"),
        ((255,), '2', '', "Set '--config.data.label_map={255:1}'"),
        ((0, 3), '4', '{0: 255, 3: 255}', 'All pixels are ignored'),
        ((0, 255), '2', '{255: 1}', ''),
        ((0, 1, 255), '2', '', ''),
        ((7, 26), 'cityscapes', 'cityscapes_ids', ''),
        ((0, 7, 13), 'cityscapes', 'cityscapes_ids', 'are they classes already'),
    ],
)
def test_maps_that_cannot_be_meant_are_faults(root, capsys, values, classes, label_map, said):
    for i in range(8):
        label = np.resize(np.array(values, np.uint8), SHAPES['train'][i])
        Image.fromarray(label).save(root / f'labels/train/train {i}.png')
    config = config_of(root, classes=classes, label_map=label_map, val='')
    if said:
        ((heading, lines),) = faults_of(capsys, config)[0].items()
        assert said in heading and lines == [f'  train  the labels store {ranges(values)}']
    else:
        clean(capsys, config)


def test_values_of_more_than_a_byte_are_faults(root, capsys):
    label = some_label('train', 0).astype(np.uint16)
    Image.fromarray(label).save(root / 'labels/train/train 0.png')  # 16 bits alone are no fault
    clean(capsys, config_of(root))
    label[0, 0] = 26001
    Image.fromarray(label).save(root / 'labels/train/train 0.png')
    ((heading, _),) = faults_of(capsys, config_of(root))[0].items()
    assert '256 in 1 of 8 labels; 256 is any beyond 255; store class ids' in heading


# ---- what is written


def test_the_pictures_show_the_examples_of_the_training(root, tmp_path, capsys):
    from psp_jax.data.pipeline import example_index, train_batches
    from psp_jax.data.sources import make_source

    config = config_of(root, val='')
    config.batch_size = 8
    source = make_source(config.data, 'train')
    kwargs = {'start_step': 0, 'process_index': 0, 'process_count': 1}
    batch = next(train_batches(source, config, **kwargs))
    order = example_index(np.arange(8), 8, config.seed).tolist()
    # An example that is bad is left out, and changes nothing for the others.
    (root / f'images/train/train {order[2]}.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='^1 faults'):
        check(config, str(tmp_path / 'shown'))
    assert '7 training examples' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / 'shown')) == [
        f'{p:03}_train_{i}.png' for p, i in enumerate(order) if p != 2
    ]
    colors = np.concatenate([label_space(config.data.classes).colors, np.full((245, 3), 32)])
    for p, i in enumerate(order):
        if p == 2:
            continue
        picture = np.asarray(Image.open(tmp_path / f'shown/{p:03}_train_{i}.png'))
        small = picture[: 33 * 7 : 7, ::7]  # enlarged to about 240 pixels
        np.testing.assert_array_equal(small[:, :33], batch['image'][p])
        np.testing.assert_array_equal(small[:, -33:], colors[batch['label'][p]])
        assert picture.shape[0] > 33 * 7  # the legend


def test_a_list_that_is_there_is_not_replaced(root, capsys):
    before = (root / 'train.txt').read_bytes()
    with pytest.raises(UserError, match='holds train.txt already; name another folder'):
        check(config_of(root), '', str(root))
    assert (root / 'train.txt').read_bytes() == before
    with pytest.raises(UserError, match='--show=.*: cannot be made'):
        check(config_of(root), str(root / 'val.txt'))


def test_without_files_no_list_is_advised_or_begun(tmp_path, capsys):
    splits = {'train': '0:3', 'val': '2:4'}
    config = config_of('', 'scenes', classes='scenes', label_map='', **splits)
    assert faults_of(capsys, config)[1] == '1 faults in 1 files: correct them'
    with pytest.raises(UserError, match='--fix-list=.*: scenes has no files for a list: leave it'):
        check(config, '', str(tmp_path / 'fixed'))
    assert os.listdir(tmp_path) == []


# ---- the command line

CONFIG = """\
from psp_jax.config import default_config


def get_config(arg=''):
    config = default_config()
    config.data.root = {root!r}
    config.data.train = 'train.txt'
    config.data.val = 'val.txt'
    config.data.classes = {classes!r}
    config.data.label_map = '{{11: 255}}'
    return config
"""


def test_the_command_line_ends_with_2_for_faults_and_0_for_none(root, tmp_path, python):
    damage(root)
    path = tmp_path / 'mine.py'
    path.write_text(CONFIG.format(root=str(root), classes=','.join(CLASSES)))
    module = ('-m', 'psp_jax.data.check', '--config', path)
    bad = python(*module)
    assert bad.returncode == 2
    assert bad.stderr == (
        'psp_jax: error: 6 faults in 6 files: correct them, or see --fix-list in --help\n'
    )
    good = python(*module, '--config.data.train=', '--config.data.val', 'val.txt')
    assert (good.returncode, good.stderr) == (0, '')
    assert good.stdout.endswith('no faults\n') and 'train' not in good.stdout


def test_the_command_line_says_what_is_wrong_with_it(capsys, monkeypatch):
    def error_of(*words):
        assert exit_code(command.run, words) == 2
        return capsys.readouterr().err

    assert '--config' in error_of()
    assert '--shwo' in error_of('--config', 'configs/camvid.py', '--shwo', 'x')
    assert "'data.crp'" in error_of('--config', 'configs/camvid.py', '--config.data.crp=3')
    config = config_of('', train='', val='')
    with pytest.raises(UserError, match='nothing to check'):
        check(config)
    flags, overrides = parse_flags(['--config', 'x.py', '--config.seed', '3', '--fix-list', 'a b'])
    assert (flags.config, flags.show, flags.fix_list) == ('x.py', '', 'a b')
    assert overrides == ['--config.seed', '3']
    monkeypatch.setenv('HOME', '/home/me')
    flags, _ = parse_flags(['--config=~/x.py:a=b', '--show=~/shown', '--fix-list', '~/fixed'])
    paths = (flags.config, flags.show, flags.fix_list)
    assert paths == ('/home/me/x.py:a=b', '/home/me/shown', '/home/me/fixed')


# ---- photographs


def test_camvid_is_without_faults(capsys):
    camvid = os.environ.get('PSP_JAX_CAMVID')
    if not camvid:
        pytest.skip('PSP_JAX_CAMVID is not set to the folder of CamVid')
    config = load_config('configs/camvid.py', [f'--config.data.root={camvid}'])
    text = clean(capsys, config)
    assert re.search(r'^train +367  480x360$', text, re.M)
    assert re.search(r'^val +101  480x360$', text, re.M)
    rows = rows_of(text)
    assert rows['stored as 11'] == rows['ignored']
    assert 3.85 <= float(rows['ignored'][0].split()[0]) < 4

"""The check of a data set, on good sets and on sets that were damaged by hand."""

import io
import os
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from psp_jax.command_line import exit_code
from psp_jax.config import default_config
from psp_jax.config_check import load_config
from psp_jax.data.check import __main__ as command
from psp_jax.data.check import faults as judged
from psp_jax.data.check.__main__ import check, parse_flags
from psp_jax.data.check.faults import likely_cause, ranges
from psp_jax.data.labels import label_space, label_table
from psp_jax.data.sources import Encoded, stored_source
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
    return groups_of(capsys, 'Fault'), str(error.value)


def groups_of(capsys, kind):
    text = capsys.readouterr().out
    found = {}
    for block in text.split('\n\n'):
        if block.startswith(kind):
            heading, *lines = re.sub(r'\n {6}(?=\S)', ' ', block).splitlines()
            count, heading = re.fullmatch(rf'{kind} \((\d+)\): (.*)', heading).groups()
            found[heading] = lines
            assert int(count) == len(lines) or '(and ' in lines[-1]
    return found


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


def test_classes_that_train_lacks_are_noted(root, capsys):
    check(config_of(root))
    notes = groups_of(capsys, 'Note')
    assert list(notes) == [judged.ABSENT]
    assert [line.split() for line in notes[judged.ABSENT]] == [
        ['train', '9', 'c9'],
        ['train', '10', 'c10'],
        ['val', '9', 'c9', 'is', 'in', '3', 'labels'],
    ]


def test_values_that_a_map_ignores_are_told_apart(root, capsys):
    rows = rows_of(clean(capsys, config_of(root, label_map='{11: 255, 0: 255, 1: 0}')))
    pixels = np.concatenate([some_label('train', i).ravel() for i in range(8)])
    assert rows['ignored'][0] == f'{100 * np.isin(pixels, (0, 11)).mean():.2f} %'
    assert rows['stored as 0'][0] == f'{100 * (pixels == 0).mean():.2f} %'
    assert rows['c0'][0] == f'{100 * (pixels == 1).mean():.2f} %'
    assert rows['c1'] == ['-'] * 4


def test_images_without_a_labelled_pixel_are_noted(root, capsys):
    Image.fromarray(np.full((24, 32), VOID, np.uint8)).save(root / 'labels/train/train 4.png')
    check(config_of(root))
    assert groups_of(capsys, 'Note')[judged.VOID] == ['  train  labels/train/train 4.png']


def test_a_test_split_of_images_alone_has_no_labels(root, capsys):
    (root / 'test').mkdir()
    for i in range(3):
        Image.fromarray(some_image('train', i)[:, ::-1]).save(root / f'test/{i} x.png')
    text = clean(capsys, config_of(root, 'dirs', test='test'))
    assert re.search(r'^test +3  30x20 to 32x24', text, re.M)
    assert 'test' not in text.split('\n\n')[2]
    (root / 'test/2 x.png').write_bytes(b'')
    faults, _ = faults_of(capsys, config_of(root, 'dirs', test='test'), '', str(root / 'fixed'))
    assert 'test/2 x.png' in faults[judged.UNREADABLE][0]
    fixed = (root / 'fixed/test.txt').read_text()
    assert fixed == f'{root}/test/0 x.png\n{root}/test/1 x.png\n'


def test_scenes_are_counted_and_may_not_be_in_two_splits(capsys):
    splits = {'train': '0:6', 'val': '6:8'}
    config = config_of('', 'scenes', classes='scenes', label_map='', **splits)
    assert rows_of(clean(capsys, config))['sky'][1::2] == ['6', '2']
    config.data.val = '5:8'
    faults, error = faults_of(capsys, config)
    assert faults == {judged.LEAKED: ['  train  scene 5 = scene 5 of val']}
    assert error.startswith('1 faults in 1 files: ')
    config.data.update(val='6:8', classes='9')
    faults, _ = faults_of(capsys, config)
    assert any('outside the classes 0..8: 9 in' in heading for heading in faults)


def test_stored_records_have_names_without_a_suffix_that_counts():
    def png(array):
        array.save(file := io.BytesIO(), 'PNG')
        return file.getvalue()

    image, label = (Image.fromarray(f('train', 0)) for f in (some_image, some_label))
    records = [
        Encoded(png(image), png(label), 'x/1.jpg', 'x/1.jpg'),
        Encoded(b'', png(label), 'x/2.jpg', 'x/2.jpg'),
    ]

    def encoded(i):
        if i == 2:
            raise UserError('example 2 of x cannot be read: delete it')
        return records[i]

    data = config_of('').data
    source = stored_source(3, lambda i: f'x/{i + 1}.jpg', encoded, data)
    split = judged.read_split(source, 'train', 1)
    assert [[f.heading for f in facts.faults] for facts in split.facts] == [
        *([], [judged.UNREADABLE], [judged.UNREADABLE])
    ]
    assert split.facts[0].pixels == Counter(some_label('train', 0).ravel().tolist())


# ---- what is wrong


def damage(root):
    """Plants a fault of each kind in `make_set`'s files; returns what `damage_pairs` does."""
    train, val = (
        [(f'images/{s}/{s} {i}.jpg', f'labels/{s}/{s} {i}.png') for i in range(len(SHAPES[s]))]
        for s in ('train', 'val')
    )
    return damage_pairs(root, train, val[1], IN_MANY)


IN_MANY = (
    '12 in 1 of 7 labels; 0..8, 11..12 are stored; name all classes in data.classes in the order '
    'of their ids, or have data.label_map turn the others into 255'
)


def damage_pairs(root, train, val, wrong):
    """Plants one fault of each kind that a file can have.

    train: eight or more (image, label) paths below root, JPEG and grey PNG of ids up to 11. val: a
    pair. wrong: what is said of a value of 12 in one label. Returns {heading: what is said of the
    files}.
    """
    images, labels = ([root / pair[k] for pair in train] for k in (0, 1))
    names = [[re.escape(name) for name in pair] for pair in train]

    images[0].write_bytes(images[0].read_bytes()[:-200])
    Image.open(images[1]).save(root / 'x.png')
    (root / 'x.png').rename(images[1])
    image = np.asarray(Image.open(images[2]))
    height, width = image.shape[:2]
    Image.fromarray(image[:-1]).save(images[2])
    label = np.array(Image.open(labels[3]))
    label[0, :2] = 12
    Image.fromarray(label).save(labels[3])
    save_as_palette(labels[4])
    images[5].write_bytes((root / val[0]).read_bytes())
    shape = np.asarray(Image.open(root / val[1])).shape
    Image.fromarray(np.resize(np.asarray(Image.open(labels[5])), shape)).save(labels[5])
    images[6].write_bytes(b'')
    Image.open(labels[7]).convert('RGB').save(labels[7])
    return {
        judged.UNREADABLE: [
            rf'{names[0][0]} cannot be decoded \(image file is truncated .*\)',
            rf'{names[6][0]} cannot be decoded \(the file is empty\)',
        ],
        judged.SUFFIX: [f'{names[1][0]} is PNG'],
        judged.SIZES: [f'{names[2][0]} is {width}x{height - 1}, {names[2][1]} is {width}x{height}'],
        f'Label values of train outside the classes 0..10: {wrong}': [f'{names[3][1]}: 12'],
        judged.MIXED.format('palette', 'grey'): [names[4][1]],
        judged.LEAKED: [f'{names[5][0]} = {re.escape(val[0])} of val'],
        judged.NO_LABEL: [f'{names[7][1]} is a label of mode RGB'],
    }


def check_found(faults, expected):
    assert faults.keys() == expected.keys()
    for heading, lines in faults.items():
        for line, pattern in zip(lines, expected[heading], strict=True):
            assert re.fullmatch(f'  train  {pattern}', line)


@pytest.mark.parametrize('source', ['list', 'dirs'])
def test_every_planted_fault_is_found_and_named(root, capsys, source):
    expected = damage(root)
    expected['data.train: mend it, or what it names'] = [
        r'images/train/alone.jpg has no partner of the same name in labels/train'
        if source == 'dirs'
        else r"train.txt:9: 'images/train/alone.jpg' is not `image label` .*"
    ]
    Image.fromarray(some_image('train', 0)).save(root / 'images/train/alone.jpg')
    with open(root / 'train.txt', 'a') as file:
        file.write('images/train/alone.jpg')
    faults, error = faults_of(capsys, config_of(root, source))
    check_found(faults, expected)
    assert error.startswith('9 faults in 9 files: ') and '\n' not in error


@pytest.mark.parametrize('source', ['list', 'dirs'])
def test_the_fixed_lists_check_clean(root, tmp_path, capsys, source):
    damage(root)
    Image.fromarray(some_image('train', 0)).save(root / 'images/train/train 8.jpg')
    Image.fromarray(some_label('train', 0)).save(root / 'labels/train/train 8.png')
    with open(root / 'train.txt', 'a') as file:
        file.write(2 * 'images/train/train 8.jpg\tlabels/train/train 8.png\n')
    config, fixed = config_of(root, source), tmp_path / 'fixed lists'
    with pytest.raises(UserError, match=rf'{9 if source == "list" else 8} faults in'):
        check(config, '', str(fixed))
    text = capsys.readouterr().out
    pair = f'{root}/images/train/train 8.jpg\t{root}/labels/train/train 8.png\n'
    assert (fixed / 'train.txt').read_text() == pair
    assert len((fixed / 'val.txt').read_text().splitlines()) == 3
    words = shlex.split(text.partition('to be used with\n')[2].split('\n')[0])
    for word in words:
        key, _, value = word.removeprefix('--config.data.').partition('=')
        config.data[key] = value
    assert re.search(r'^train +1 .*\nval +3 ', clean(capsys, config), re.M)


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
    assert f'Fault (1): data.val: mend it, or what it names\n  val    {message}\n' in text
    assert text.partition('used with\n')[2].split('\n')[0].endswith(' --config.data.val=')
    assert os.listdir(tmp_path / 'fixed') == ['train.txt']


def test_missing_files_and_jpeg_labels_are_found(root, capsys):
    (root / 'images/val/val 0.jpg').unlink()
    (root / 'labels/train/train 0.png').unlink()
    Image.fromarray(some_label('train', 1)).save(root / 'x.jpg')
    (root / 'x.jpg').rename(root / 'labels/train/train 1.png')
    faults, error = faults_of(capsys, config_of(root))
    assert faults[judged.UNREADABLE] == [
        '  train  labels/train/train 0.png does not exist',
        '  val    images/val/val 0.jpg does not exist',
    ]
    assert 'train 1.png is a JPEG' in faults[judged.NO_LABEL][0]
    assert error.startswith('3 faults in 3 files')


def test_more_faults_of_a_kind_than_can_be_read_are_counted(root, capsys):
    for i in range(30):
        (root / f'images/train/{i:02}.jpg').write_bytes(b'no picture')
        Image.fromarray(some_label('train', 0)).save(root / f'labels/train/{i:02}.png')
    with pytest.raises(UserError, match='^30 faults in 30 files'):
        check(config_of(root, 'dirs'), '', str(root / 'fixed'))
    text = capsys.readouterr().out
    assert f'Fault (30): {judged.UNREADABLE}' in text
    assert text.count('not a known picture format') == 20 and '(and 10 more)' in text
    assert len((root / 'fixed/train.txt').read_text().splitlines()) == 8


def test_images_that_are_there_twice_are_told(root, capsys):
    pictures = {'a': 'images/train/train 0.jpg', 'b': 'images/val/val 0.jpg'}
    label = 'labels/train/train 0.png'
    for name, path in pictures.items():
        (root / f'{name}.jpg').write_bytes((root / path).read_bytes())
    with open(root / 'train.txt', 'a') as file:
        file.write(f'{pictures["a"]}\t{label}\na.jpg\t{label}\n')
    (root / 'test.txt').write_text('b.jpg\n')
    with pytest.raises(UserError, match='^1 faults in 1 files'):
        check(config_of(root, test='test.txt'))
    text = capsys.readouterr().out
    assert f'Fault (1): {judged.TWICE}\n  train  {pictures["a"]}\n' in text
    assert (
        f'Note (2): {judged.EQUAL}\n  test   b.jpg = {pictures["b"]} of val\n'
        f'  train  a.jpg = {pictures["a"]}\n'
    ) in text


def save_as_palette(path):
    picture = Image.open(path).convert('L')
    array = np.asarray(picture)
    picture = Image.fromarray(array)
    picture.putpalette(np.arange(768).astype(np.uint8).tobytes())
    picture.save(path)


@pytest.mark.parametrize(('palettes', 'named'), [(8, ()), (7, (7,)), (4, None), (1, (0,))])
def test_the_few_labels_that_are_stored_in_another_way_are_faults(root, capsys, palettes, named):
    for i in range(palettes):
        save_as_palette(root / f'labels/train/train {i}.png')
    config = config_of(root)
    if named:
        kinds = ('palette', 'grey') if palettes == 1 else ('grey', 'palette')
        expected = [f'  train  labels/train/train {i}.png' for i in named]
        assert faults_of(capsys, config)[0] == {judged.MIXED.format(*kinds): expected}
    else:
        text = clean(capsys, config)
        assert (judged.TWO_WAYS in text) == (named is None)


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
        ({**dict.fromkeys(range(9), 90)}, '7', 'minus_one', 'data.label_map turn the others'),
    ],
)
def test_the_likeliest_cause_of_wrong_values_is_told(stored, classes, label_map, cause):
    data = ConfigDict({'classes': classes, 'label_map': label_map})
    count, table = len(label_space(classes).names), [*label_table(label_map), 256]
    wrong = [v for v in stored if table[v] >= count and table[v] != 255]
    assert cause in likely_cause(Counter(stored), wrong, 100, data)


def test_of_two_causes_the_value_in_more_images_is_named_first():
    data = ConfigDict({'classes': '7', 'label_map': ''})
    for zero, seven in ((90, 20), (20, 90)):
        stored = Counter(dict.fromkeys(range(1, 7), 50) | {0: zero, 7: seven})
        said = likely_cause(stored, [7], 100, data)
        assert (said.index('minus_one') < said.index('{7:255}')) == (zero > seven)


def test_rare_and_frequent_wrong_values_are_told_apart(root, capsys):
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
        ((0, 10, 18), 'cityscapes', 'cityscapes_ids', 'train ids?'),
        ((0, 255), '2', '{255: 1}', ''),
        ((0, 1, 255), '2', '', ''),
        ((7, 26), 'cityscapes', 'cityscapes_ids', ''),
    ],
)
def test_label_maps_that_cannot_be_meant_are_faults(root, capsys, values, classes, label_map, said):
    for i in range(8):
        label = np.resize(np.array(values, np.uint8), SHAPES['train'][i])
        Image.fromarray(label).save(root / f'labels/train/train {i}.png')
    config = config_of(root, classes=classes, label_map=label_map, val='')
    if said:
        ((heading, lines),) = faults_of(capsys, config)[0].items()
        assert said in heading and lines == [f'  train  8 labels store {ranges(values)}']
    else:
        clean(capsys, config)


def test_values_of_more_than_a_byte_are_faults(root, capsys):
    label = some_label('train', 0).astype(np.uint16)
    Image.fromarray(label).save(root / 'labels/train/train 0.png')  # 16 bits alone are none
    clean(capsys, config_of(root))
    label[0, 0] = 26001
    Image.fromarray(label).save(root / 'labels/train/train 0.png')
    ((heading, _),) = faults_of(capsys, config_of(root))[0].items()
    assert '256 in 1 of 8 labels; 256 is any beyond 255; store class ids' in heading


# ---- what is written


def test_an_input_list_is_never_written_over(root, capsys):
    before = (root / 'train.txt').read_bytes()
    os.symlink(root, root.parent / 'link')
    for folder in (root, root.parent / 'link'):
        with pytest.raises(UserError, match='is a list that is read; name another folder'):
            check(config_of(root, val=''), '', str(folder))
    assert capsys.readouterr().out == ''
    assert (root / 'train.txt').read_bytes() == before
    with pytest.raises(UserError, match='is no folder that can be written to'):
        check(config_of(root), str(root / 'val.txt'))


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


def test_where_there_are_no_files_no_list_is_advised_or_begun(tmp_path, capsys):
    splits = {'train': '0:3', 'val': '2:4'}
    config = config_of('', 'scenes', classes='scenes', label_map='', **splits)
    assert faults_of(capsys, config)[1] == '1 faults in 1 files: mend them'
    with pytest.raises(UserError, match='--fix-list=.*: scenes has no files for a list: leave it'):
        check(config, '', str(tmp_path / 'fixed'))
    assert os.listdir(tmp_path) == []


def test_folders_in_which_nothing_is_written_are_not_left(root, tmp_path, capsys):
    for path in [*root.glob('images/*/*'), root / 'train.txt']:
        path.write_bytes(b'')
    faults_of(capsys, config_of(root), str(tmp_path / 'shown'), str(tmp_path / 'deep/fixed'))
    assert os.listdir(tmp_path) == ['my data']


def test_a_folder_that_is_refused_is_not_made(root, tmp_path):
    (tmp_path / 'empty').mkdir()
    before = sorted(tmp_path.rglob('*'))
    for source, shown, fixed, said in (
        ('dirs', 'my data/images/train/x', '', '--show=.*: lies in a folder that is read'),
        ('dirs', 'shown', 'my data/labels/val/x/y', '--fix-list=.*: lies in a folder that is read'),
        ('list', 'empty/shown', 'my data/val.txt/x', '--fix-list=.*: is no folder that can be'),
    ):
        folders = [str(tmp_path / path) if path else '' for path in (shown, fixed)]
        with pytest.raises(UserError, match=said):
            check(config_of(root, source), *folders)
        assert sorted(tmp_path.rglob('*')) == before


def test_a_path_that_no_list_can_hold_is_named(tmp_path):
    make_set(tmp_path / 'my\tdata')
    with pytest.raises(UserError) as error:
        check(config_of(tmp_path / 'my\tdata'), '', str(tmp_path / 'fixed'))
    assert "train 0.jpg': rename it, lists of files cannot hold such a name" in str(error.value)
    assert '\t' not in str(error.value)
    assert os.listdir(tmp_path) == ['my\tdata']


def test_the_time_is_that_of_reading_alone(root, tmp_path, capsys, monkeypatch):
    now = iter(range(0, 100, 7))
    monkeypatch.setattr(command.time, 'monotonic', lambda: next(now))
    monkeypatch.setattr(command, 'show', lambda *_: next(now))
    assert '11 examples read in 7 s' in clean(capsys, config_of(root), str(tmp_path / 'shown'))


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
        'psp_jax: error: 8 faults in 8 files: mend them, or see --fix-list in --help\n'
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


@pytest.fixture
def camvid():
    if 'PSP_JAX_CAMVID' not in os.environ:
        pytest.skip('PSP_JAX_CAMVID is not set to the folder of CamVid')
    return Path(os.environ['PSP_JAX_CAMVID']).resolve()


def test_camvid_is_without_faults(camvid, capsys):
    config = load_config('configs/camvid.py', [f'--config.data.root={camvid}'])
    text = clean(capsys, config)
    assert re.search(r'^train +367  480x360$', text, re.M)
    assert re.search(r'^val +101  480x360$', text, re.M)
    rows = rows_of(text)
    assert rows['stored as 11'] == rows['ignored']
    assert 3.85 <= float(rows['ignored'][0].split()[0]) < 4
    assert 'Note' not in text


def test_every_fault_planted_in_a_copy_of_camvid_is_found_and_named(camvid, tmp_path, capsys):
    pairs = {}
    for split, count in (('train', 40), ('val', 3)):
        lines = (camvid / f'{split}.txt').read_text().splitlines()[:count]
        pairs[split] = [tuple(line.split()) for line in lines]
        for path in (path for pair in pairs[split] for path in pair):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes((camvid / path).read_bytes())
        (tmp_path / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    wrong = '12 in 1 of 40 labels; so few may be of another labelling; mend them, or leave them out'
    # at a distance, as neighbours in the video are alike
    expected = damage_pairs(tmp_path, pairs['train'][::5], pairs['val'][1], wrong)
    again, alone = pairs['train'][39], pairs['train'][1][0]
    with open(tmp_path / 'train.txt', 'a') as file:
        file.write(f'{" ".join(again)}\n{alone}\n')
    expected[judged.TWICE] = [re.escape(again[0])]
    line = rf"train.txt:42: '{re.escape(alone)}' is not `image label` .*"
    expected['data.train: mend it, or what it names'] = [line]
    config = load_config('configs/camvid.py', [f'--config.data.root={tmp_path}'])
    faults, error = faults_of(capsys, config)
    check_found(faults, expected)
    assert error.startswith('10 faults in 10 files: ')

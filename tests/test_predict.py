"""Label maps of pictures of all kinds, by the command line and by the API."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from psp_jax import predict
from psp_jax.data.labels import label_space
from psp_jax.data.sources import make_source
from psp_jax.errors import UserError
from psp_jax.main import main


def a_picture(height=40, width=57, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def pictures(tmp_path):
    """A folder of every kind of picture that people have."""
    folder = tmp_path / 'pictures'
    (folder / 'below').mkdir(parents=True)
    rgb = Image.fromarray(a_picture())
    rgb.save(folder / 'photo.jpg')
    rgb.convert('L').save(folder / 'grey.png')
    rgb.convert('RGBA').save(folder / 'alpha.png')
    rgb.convert('P').save(folder / 'palette.png')
    rgb.convert('CMYK').save(folder / 'cmyk.jpg')
    deep = np.random.default_rng(1).integers(0, 2**16, (33, 45)).astype(np.uint16)
    Image.fromarray(deep).save(folder / 'sixteen.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    rgb.save(folder / 'turned.jpg', exif=exif)
    Image.fromarray(a_picture(16, 16)).save(folder / 'below' / 'small.png')
    Image.fromarray(a_picture(20, 150)).save(folder / 'below' / 'long.png')
    return folder


SIZES = {
    **dict.fromkeys(('photo', 'grey', 'alpha', 'palette', 'cmyk'), (40, 57)),
    **{'sixteen': (33, 45), 'turned': (57, 40), 'below/small': (16, 16), 'below/long': (20, 150)},
}


def test_pictures_of_all_kinds(pictures, trained, tmp_path, python):
    """The command line: all are done, and one that is broken is named at the end."""
    (pictures / 'broken.jpg').write_bytes((pictures / 'photo.jpg').read_bytes()[:300])
    (pictures / 'notes.txt').write_text('not a picture')
    output = tmp_path / 'out'
    words = ['--mode', 'predict', '--workdir', trained.workdir, '--probabilities']
    run = python('-m', 'psp_jax.main', *words, '--images', pictures, '--output', output)
    assert run.returncode == 2
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith('psp_jax: error: 1 of 10 pictures could not be read: ')
    assert str(pictures / 'broken.jpg') in error
    assert f'9 label maps and overlays written to {output}' in run.stdout

    space = label_space('10')
    network = predict.load(str(trained.workdir))
    for name, size in SIZES.items():
        with Image.open(output / f'{name}.png') as picture:
            assert picture.mode == 'P' and picture.size == size[::-1]
            palette = np.reshape(picture.getpalette()[:30], (10, 3))
            np.testing.assert_array_equal(palette, space.colors)
            ids = np.asarray(picture)
        scores = np.load(output / f'{name}.npy')
        assert scores.shape == (*size, 10) and scores.dtype == np.float16
        np.testing.assert_allclose(scores.sum(-1, dtype=np.float32), 1, atol=0.01)
        with Image.open(output / f'{name}_overlay.jpg') as overlay:
            assert overlay.size[0] >= size[1] and overlay.size[1] > size[0]  # a legend below
        if name == 'photo':
            with Image.open(pictures / 'photo.jpg') as picture:
                np.testing.assert_array_equal(network(np.asarray(picture)), ids)
    written = {p.relative_to(output).as_posix() for p in output.rglob('*') if p.is_file()}
    endings = ('.png', '.npy', '_overlay.jpg')
    assert written == {f'{name}{ending}' for name in SIZES for ending in endings}


@pytest.fixture(scope='module')
def network(trained):
    return predict.load(str(trained.workdir), 'best')


def test_the_api_takes_arrays_of_any_size(network):
    for size in ((1, 1), (16, 16), (57, 40), (33, 200)):
        image = a_picture(*size)
        scores = network.probabilities(image)
        assert scores.shape == (*size, 10) and scores.dtype == np.float32
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
        ids = network(image)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, scores.argmax(-1))
    grey = a_picture()[..., 0]
    np.testing.assert_array_equal(network(grey), network(np.repeat(grey[..., None], 3, 2)))
    for wrong in (a_picture() / 255, a_picture()[..., :2], a_picture()[None], a_picture(0, 5)):
        with pytest.raises(UserError, match='an image must'):
            network(wrong)


def test_configuration_of_the_checkpoint_can_be_overridden(trained):
    network = predict.load(
        str(trained.workdir / 'checkpoints' / '5'),
        overrides={'eval.protocol': 'semseg', 'eval.base_size': 64},
    )
    assert network.config.eval.base_size == 64 and network(a_picture()).shape == (40, 57)
    with pytest.raises(UserError, match=r"'eval.protocl' is unknown"):
        predict.load(str(trained.workdir), overrides={'eval.protocl': 'semseg'})


def test_large_images_are_seen_in_windows(trained):
    image = a_picture(70, 90)
    for protocol, windows in (('whole', 'semseg'), ('mmseg', 'mmseg_slide')):
        keys = {'eval.protocol': protocol, 'eval.flip': 'true', 'eval.base_size': 80}
        large, expected = (
            predict.load(str(trained.workdir), 'best', keys | {'eval.protocol': name})
            for name in (protocol, windows)
        )
        found = predict.Predictor(large.config, large._variables, 50 * 50).probabilities(image)
        np.testing.assert_allclose(found, expected.probabilities(image), atol=1e-6)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        ('{}/nothing', 'no picture, folder of pictures, or glob'),
        ('{}/empty', 'no picture, folder of pictures, or glob'),
        ('{}/twins', 'have the same name: predict them apart'),
    ],
)
def test_images_that_cannot_be_found_are_one_line(images, message, trained, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'twins').mkdir()
    for name in ('a.png', 'a.jpg'):
        Image.fromarray(a_picture()).save(tmp_path / 'twins' / name)
    words = [
        '--mode',
        'predict',
        '--workdir',
        str(trained.workdir),
        '--output',
        str(tmp_path / 'o'),
    ]
    assert main([*words, '--images', images.format(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and not (tmp_path / 'o').exists()


def test_pictures_are_never_replaced_by_their_label_maps(trained, tmp_path, capsys):
    Image.fromarray(a_picture()).save(tmp_path / 'a.png')
    before = (tmp_path / 'a.png').read_bytes()
    words = ['--mode', 'predict', '--workdir', str(trained.workdir), '--images', str(tmp_path)]
    assert main([*words, '--output', str(tmp_path)]) == 2
    assert f'would replace {tmp_path / "a.png"}' in capsys.readouterr().err
    assert (tmp_path / 'a.png').read_bytes() == before
    (tmp_path / 'out').mkdir()
    Image.fromarray(a_picture()).save(tmp_path / 'out' / 'a.png')
    assert list(predict.find_images(str(tmp_path), str(tmp_path / 'out')).values()) == ['a']


def test_an_output_that_cannot_be_written_is_one_line(trained, tmp_path, capsys):
    Image.fromarray(a_picture()).save(tmp_path / 'a.png')
    (tmp_path / 'file').write_text('')
    words = ['--mode', 'predict', '--workdir', str(trained.workdir)]
    words += ['--images', str(tmp_path / 'a.png'), '--output', str(tmp_path / 'file')]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert 'cannot be written' in error and error.count('\n') == 1


def test_a_glob_keeps_folders_below_the_common_one(tmp_path):
    for name in ('a/x.png', 'b/x.png', 'b/y.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(a_picture()).save(tmp_path / name)
    found = predict.find_images(f'{tmp_path}/*/*')
    assert sorted(found.values()) == ['a/x', 'b/x', 'b/y']
    assert list(predict.find_images(f'{tmp_path}/b/y.jpg').values()) == ['y']


# ---- Splits by --mode eval


def copy_of(trained, tmp_path):
    shutil.copytree(trained.workdir / 'checkpoints', tmp_path / 'run' / 'checkpoints')
    return ['--mode', 'eval', '--workdir', str(tmp_path / 'run')]


def test_sliding_windows_by_the_command_line_leave_a_report(trained, tmp_path, capsys):
    words = ['--config.eval.protocol=semseg', '--config.eval.scales=(1, 1.5)']
    words += ['--config.eval.base_size=64', '--config.eval.save_predictions=true']
    assert main([*copy_of(trained, tmp_path), *words]) == 0
    folder = tmp_path / 'run' / 'eval' / '10-semseg'
    scores = json.loads((folder / 'metrics.json').read_text())
    assert (scores['protocol'], scores['scales'], scores['flip']) == ('semseg', [1.0, 1.5], True)
    assert (tmp_path / 'run' / 'eval' / 'metrics.json').read_text() == (
        folder / 'metrics.json'
    ).read_text()
    page = (folder / 'report.html').read_text()
    assert f'{scores["mIoU"]:.2%}' in page and 'best' in page and 'semseg, scales 1, 1.5' in page
    # The predictions on file are those that were scored.
    predictions = sorted((folder / 'predictions' / 'val').glob('*.png'))
    network = predict.load(
        str(trained.workdir),
        'latest',
        {'eval.protocol': 'semseg', 'eval.scales': (1.0, 1.5), 'eval.base_size': 64},
    )
    source = make_source(network.config.data, 'val')
    assert len(predictions) == source.length == scores['images']
    for number, path in enumerate(predictions):
        with Image.open(path) as picture:
            found = np.asarray(picture)
        np.testing.assert_array_equal(found, network(source.read(number)[0]))
    assert 'written to' in capsys.readouterr().out


@pytest.mark.parametrize('form', ['list', 'dirs', 'labels of 255'])
def test_a_split_without_labels_gets_predictions_alone(form, trained, tmp_path, capsys):
    for i in range(2):
        path = tmp_path / 'images' / f'unknown {i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(a_picture(seed=i)).save(path)
    (tmp_path / 'test.txt').write_text('images/unknown 0.png\nimages/unknown 1.png\n')
    words = ['--config.eval.split=test', f'--config.data.root={tmp_path}']
    if form == 'labels of 255':  # as those of Cityscapes's test set
        Image.new('L', (57, 40), 255).save(tmp_path / 'void.png')
        lines = [f'images/unknown {i}.png\tvoid.png\n' for i in range(2)]
        (tmp_path / 'test.txt').write_text(''.join(lines))
    words += [f'--config.data.source={"dirs" if form == "dirs" else "list"}']
    words += ['--config.data.test=images' if form == 'dirs' else '--config.data.test=test.txt']
    assert main([*copy_of(trained, tmp_path), *words]) == 0
    written = [p.relative_to(tmp_path / 'run' / 'eval') for p in tmp_path.rglob('run/eval/**/*.*')]
    assert sorted(map(str, written)) == [
        f'10-whole/predictions/test/unknown {i}.png' for i in range(2)
    ]
    with Image.open(tmp_path / 'run/eval/10-whole/predictions/test/unknown 1.png') as picture:
        ids = np.asarray(picture)
    network = predict.load(str(trained.workdir))
    np.testing.assert_array_equal(ids, network(a_picture(seed=1)))

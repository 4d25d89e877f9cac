"""Label maps of images of all kinds, by the command line and by the API."""

import numpy as np
import pytest
from PIL import Image

from psp_jax import predict
from psp_jax.data.labels import label_space
from psp_jax.errors import UserError
from psp_jax.predict import find_images


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
    assert error.startswith('psp_jax: error: 1 of 10 images could not be read: ')
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
        large.piece = 50 * 50
        np.testing.assert_allclose(
            large.probabilities(image), expected.probabilities(image), atol=1e-6
        )


def test_images_are_found_in_a_folder_or_by_a_glob(tmp_path):
    for name in ('a/x.png', 'b/x.png', 'b/y.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(find_images(f'{tmp_path}/*/*').values()) == ['a/x', 'b/x', 'b/y']
    assert list(find_images(f'{tmp_path}/b/y.jpg').values()) == ['y']
    # What lies in the folder of results is left out.
    assert list(find_images(str(tmp_path), f'{tmp_path}/a').values()) == ['b/x', 'b/y']
    (tmp_path / 'b' / 'x.jpg').touch()
    with pytest.raises(UserError, match='have the same name: predict them apart'):
        find_images(str(tmp_path))
    (tmp_path / 'empty').mkdir()
    for name in ('nothing', 'empty'):
        with pytest.raises(UserError, match='no image, folder of images, or glob of some'):
            find_images(str(tmp_path / name))


def test_results_replace_no_image_and_need_a_folder(tmp_path):
    for name in ('a.png', 'file'):
        (tmp_path / name).touch()
    names = {str(tmp_path / 'a.png'): 'a'}
    for output, message in ((tmp_path, 'would replace'), (tmp_path / 'file', 'cannot be written')):
        with pytest.raises(UserError, match=message):
            predict.predict_images(None, names, str(output), False)

"""Files of weights are read, and what they ask to run is not run."""

import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

from psp_jax.errors import UserError
from psp_jax.weights import files


def error_of(source):
    with pytest.raises(UserError) as caught:
        files.read_file(str(source))
    assert '\n' not in str(caught.value) and str(source) in str(caught.value)
    return str(caught.value)


# ---- Without PyTorch


def test_sources_that_cannot_be_read(tmp_path):
    assert 'there is no such file' in error_of(tmp_path / 'no.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes(b'\x99' * 100)
    assert 'cannot be read as safetensors' in error_of(tmp_path / 'cut.safetensors')
    (tmp_path / 'x.npz').write_bytes(b'')
    assert 'are read from .pth' in error_of(tmp_path / 'x.npz')
    assert 'expected hf://OWNER/NAME' in error_of('hf://timm')


def test_a_hub_without_a_network_is_one_line_with_the_remedy(monkeypatch):
    import huggingface_hub

    def fails(repository, file):
        assert (repository, file) == ('timm/resnet50s.gluon_in1k', 'model.safetensors')
        raise huggingface_hub.errors.LocalEntryNotFoundError('no network\nmore')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fails)
    error = error_of('hf://timm/resnet50s.gluon_in1k')
    assert 'no network' in error and '--config.init_from=FILE' in error and "init_from=''" in error


def test_a_file_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub
    import safetensors.numpy

    copies = {('o/n', 'a/b.st'): str(tmp_path / 'x.safetensors')}
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda *words: copies[words])
    safetensors.numpy.save_file({'a': np.arange(3)}, tmp_path / 'x.safetensors')
    arrays, _ = files.read_file('hf://o/n/a/b.st')
    assert arrays['a'].tolist() == [0, 1, 2]


def test_without_pytorch_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch', None)
    (tmp_path / 'x.pth').touch()
    assert 'pip install "torch>=2.6"' in error_of(tmp_path / 'x.pth')


# ---- With PyTorch


class Remark:
    """A class that is not needed to read a file."""

    def __init__(self, text):
        self.text, self.numbers = text, [1, 2]


class Call:
    """Unpickles by a call."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


@pytest.fixture
def torch():
    return pytest.importorskip('torch', reason='PyTorch is not installed')


def state_dict(torch):
    return OrderedDict(
        (
            ('a.weight', torch.arange(6.0).reshape(2, 3)),
            ('a.half', torch.ones(2, dtype=torch.bfloat16)),
            ('a.num_batches_tracked', torch.tensor(3)),
        )
    )


def assert_read(path):
    found, _ = files.read_file(str(path))
    assert list(found) == ['a.weight', 'a.half', 'a.num_batches_tracked']
    np.testing.assert_array_equal(found['a.weight'], np.arange(6).reshape(2, 3))
    assert found['a.half'].dtype == np.float32


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 1.6'])
@pytest.mark.parametrize('key', ['', 'state_dict', 'model'])
def test_state_dicts_are_found(torch, tmp_path, key, zipped):
    content = {key: state_dict(torch), 'epoch': 7} if key else state_dict(torch)
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
def test_objects_of_unknown_classes_are_ignored(torch, tmp_path):
    history = {'loss': np.float64(0.5), 'curve': np.arange(3), 'remark': Remark('not needed')}
    torch.save({'state_dict': state_dict(torch), 'meta': history}, tmp_path / 'x.pth')
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
@pytest.mark.filterwarnings('ignore')
def test_a_checkpoint_of_mmsegmentations_own_training(torch, tmp_path):
    logging = pytest.importorskip('mmengine.logging')
    buffer = logging.HistoryBuffer([1.0, 2.0], [1, 1])
    hub = {'log_scalars': {'loss': buffer}, 'runtime_info': {'iter': 7}}
    torch.save({'state_dict': state_dict(torch), 'message_hub': hub}, tmp_path / 'x.pth')
    assert_read(tmp_path / 'x.pth')


@pytest.mark.torch
@pytest.mark.parametrize(
    ('meta', 'stated'),
    [
        ({'config': 'decode_head = dict(\n    align_corners=True,\n    channels=512)'}, True),
        ({'cfg': 'decode_head=dict(align_corners=False), auxiliary_head=...'}, False),
        ({'config': "a=dict(align_corners=True), b={'align_corners': False}"}, None),
        ({'epoch': 3}, None),
    ],
)
def test_mmsegmentations_files_tell_whether_corners_are_aligned(torch, tmp_path, meta, stated):
    torch.save({'meta': meta, 'state_dict': state_dict(torch)}, tmp_path / 'x.pth')
    _, found = files.read_file(str(tmp_path / 'x.pth'))
    assert found == ({} if stated is None else {'model.align_corners': stated})


@pytest.mark.torch
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 1.6'])
@pytest.mark.parametrize(
    'make',
    [
        lambda path: Call(os.system, f'touch "{path}"'),
        lambda path: Call(eval, f'open({str(path)!r}, "w")'),
        lambda path: Call(subprocess.run, ['touch', str(path)]),
        lambda path: Call(Remark, f'{path}'),  # any call at all
    ],
    ids=['system', 'eval', 'run', 'class'],
)
def test_code_in_a_file_never_runs(torch, tmp_path, make, zipped):
    mark, path = tmp_path / 'it ran', tmp_path / 'x.pth'
    content = {'state_dict': state_dict(torch), 'extra': make(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert 'model.state_dict() alone' in error_of(path)
    assert not mark.exists()


@pytest.mark.torch
def test_files_that_are_broken_or_hold_something_else(torch, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(state_dict(torch), path)
    whole = path.read_bytes()
    for content in (whole[:-300], whole[: len(whole) // 2], b'', b'no pickle'):
        path.write_bytes(content)
        assert 'cannot be read as a PyTorch file' in error_of(path)
    for content in (torch.nn.Linear(2, 2), {'epoch': 3}, [1]):
        torch.save(content, path)
        assert 'no state dict' in error_of(path)
    torch.save({'a': torch.ones(3).to_sparse()}, path)
    assert 'a is not a plain dense tensor' in error_of(path)

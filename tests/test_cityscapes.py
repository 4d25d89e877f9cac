"""Our metrics on Cityscapes against those of the official cityscapesscripts."""

import contextlib
import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from psp_jax.main import main

pytestmark = pytest.mark.torch  # needs requirements-torch.txt

CONFIG = """\
from psp_jax.config import default_config


def get_config(arg=''):
    config = default_config()
    config.total_steps = 1
    config.batch_size = 2
    config.data.root = {root!r}
    config.data.train = config.data.val = 'val.txt'
    config.data.classes = 'cityscapes'
    config.data.label_map = 'cityscapes_ids'
    config.data.crop = 33
    config.model.depth = 18
    config.model.stem = 'deep_small'
    config.model.head_width = config.model.aux_width = 8
    config.eval.save_predictions = True
    return config
"""


def test_figures_equal_the_official_scripts(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official

    rng = np.random.default_rng(0)
    lines, truths = [], []
    for city, count in (('here', 2), ('there', 3)):
        for i in range(count):
            stem = f'{city}/{city}_000000_{i:06}'
            image = tmp_path / f'leftImg8bit/val/{stem}_leftImg8bit.png'
            label = tmp_path / f'gtFine/val/{stem}_gtFine_labelIds.png'
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            # All ids, also those that are not evaluated, except train and bus.
            ids = rng.choice([v for v in range(34) if v not in (28, 31)], (6, 11)).astype(np.uint8)
            Image.fromarray(ids.repeat(12, 0).repeat(12, 1)).save(label)
            Image.fromarray(rng.integers(0, 256, (72, 132, 3), np.uint8)).save(image)
            lines.append(f'{image.relative_to(tmp_path)} {label.relative_to(tmp_path)}')
            truths.append(str(label))
    (tmp_path / 'val.txt').write_text('\n'.join(lines))
    (tmp_path / 'config.py').write_text(CONFIG.format(root=str(tmp_path)))
    workdir = tmp_path / 'run'
    assert main(['--config', str(tmp_path / 'config.py'), '--workdir', str(workdir)]) == 0
    assert main(['--mode', 'eval', '--workdir', str(workdir)]) == 0
    ours = json.loads((workdir / 'eval' / 'metrics.json').read_text())

    folder = workdir / 'eval' / '1-whole' / 'predictions' / 'val'
    predictions = [str(folder / f'{line.split(" ")[0][16:]}') for line in lines]
    official.args.evalInstLevelScore = official.args.JSONOutput = False
    official.args.quiet = True
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = official.evaluateImgLists(predictions, truths, official.args)
    assert ours['mIoU'] == pytest.approx(theirs['averageScoreClasses'], abs=1e-9)
    assert ours['category_mIoU'] == pytest.approx(theirs['averageScoreCategories'], abs=1e-9)
    for c in ours['classes']:
        expected = theirs['classScores'][c['name']]
        assert (c['iou'] is None) == np.isnan(expected)
        if c['iou'] is not None:
            assert c['iou'] == pytest.approx(expected, abs=1e-9)
    for name, iou in ours['categories'].items():
        assert iou == pytest.approx(theirs['categoryScores'][name], abs=1e-9)

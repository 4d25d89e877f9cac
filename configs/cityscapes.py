"""PSPNet on Cityscapes' 19 classes, trained on the 2,975 finely annotated images.

Command:  python -m psp_jax.main --config configs/cityscapes.py:depth=101

          With the coarse annotations, which took the paper from 78.4 to 80.2 mIoU on the test set,
          in two stages:

          python -m psp_jax.main --workdir runs/coarse \
              --config configs/cityscapes.py:depth=101,source=tfds,recipe=coarse
          python -m psp_jax.main --config.init_from=runs/coarse \
              --config configs/cityscapes.py:depth=101,source=tfds

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269
  recipe=paper      paper: 90,000 steps, without rotation and blur
                    semseg (the authors' PyTorch code): 37,200 steps, with both
                    coarse: as paper, on the 19,998 coarsely annotated images: the first stage
  source=list       list: the files below; tfds: what psp_jax.datasets prepares

Expect:   published validation mIoU / pixel accuracy (semseg's README), by sliding windows at a
          single scale: PSPNet-50 77.30 / 95.97, PSPNet-101 78.63 / 96.14. The paper reports the
          test set: 78.4 mIoU with PSPNet-101 at several scales. Each started from ImageNet weights,
          as this does: timm's resnet50s, 101s or 152s, fetched from the Hugging Face Hub.
          Evaluations during training see images in one piece, 2049 x 1025; the published way is
          `--mode eval --config.eval.protocol=semseg`.

Fits:     as it stands on one card of 80 GB: 43.7 GiB of an H100 as compiled. depth=101 needs
          bfloat16 there: 39.6 of 59.3 GiB, where float32 takes 60.2. Of TPUs, in bfloat16, on
          one v5e chip: 14.7 of 15.75 GiB; v5e:2x2 has 7.6 a chip, v5e:2x4 6.7 at depth=101
          (docs/scale.md).

Data:     leftImg8bit and gtFine in `data/cityscapes` (or --config.data.root=DIR), the latter with
          the *_labelTrainIds.png that csCreateTrainIdLabelImgs of cityscapesscripts makes. The
          lists, of 2,975 and 500 lines, are made in that folder by

  for split in train val; do
      (cd leftImg8bit/$split && ls */*.png) | sed "s|_leftImg8bit.png||; s|.*|leftImg8bit/$split/&\
_leftImg8bit.png gtFine/$split/&_gtFine_labelTrainIds.png|" > fine_$split.txt; done

          Lists of the original *_labelIds.png work with --config.data.label_map=cityscapes_ids.
          coarse_train_extra.txt pairs leftImg8bit/train_extra with gtCoarse/train_extra likewise.

          With source=tfds none of that is needed: put leftImg8bit_trainvaltest.zip and
          gtFine_trainvaltest.zip (and leftImg8bit_trainextra.zip and gtCoarse.zip) of
          cityscapes-dataset.com into a folder, and
          `python -m psp_jax.datasets cityscapes --manual_dir FOLDER` makes it of the label ids.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, read_tfds, set_depth
from psp_jax.config_values import choose


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, depth=50, recipe='paper', source='list')
    config = default_config()
    steps = {'paper': 90_000, 'semseg': 37_200, 'coarse': 90_000}
    config.total_steps = choose('recipe', args.recipe, steps)

    config.data.source = 'list'
    config.data.root = 'data/cityscapes'
    config.data.train = 'fine_train.txt'
    config.data.val = 'fine_val.txt'
    config.data.classes = 'cityscapes'
    config.data.crop = 713
    if choose('source', args.source, {'list': False, 'tfds': True}):
        read_tfds(config, 'cityscapes')
    if args.recipe == 'coarse':
        config.data.train = 'train_extra' if args.source == 'tfds' else 'coarse_train_extra.txt'
    if args.recipe != 'semseg':
        config.data.rotate = 0.0
        config.data.blur = 0.0

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269: none are public
    config.eval.base_size = 2048  # pixels, the long side; it becomes the nearest 8n + 1
    config.eval.batch_size = 2  # images of 2 megapixels
    return config

"""PSPNet on Cityscapes' 19 classes, trained on the 2,975 finely annotated images.

Command:  python -m psp_jax.main --config configs/cityscapes.py:depth=101

          Training with the coarse annotations takes two stages (the paper: 80.2 mIoU on the test
          set instead of 78.4):

          python -m psp_jax.main --workdir runs/coarse \
              --config configs/cityscapes.py:depth=101,source=tfds,recipe=coarse
          python -m psp_jax.main --config.init_from=runs/coarse \
              --config configs/cityscapes.py:depth=101,source=tfds

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269
  recipe=paper      paper: 90,000 steps, without rotation and blur
                    semseg (the authors' PyTorch code): 37,200 steps, with both
                    coarse: the first of two stages, on the 19,998 coarsely annotated images
  source=list       list: the files below; tfds: the data set that psp_jax.datasets makes

Expect:   published validation mIoU / pixel accuracy (semseg's README), by sliding windows at a
          single scale: PSPNet-50 77.30 / 95.97, PSPNet-101 78.63 / 96.14. The paper reports the
          test set: 78.4 mIoU with PSPNet-101 at several scales. All start from ImageNet weights. So
          does this: timm's resnet50s, 101s or 152s, downloaded from the Hugging Face Hub.
          Evaluations during training use whole images, 2049 x 1025. For the published way use
          `--mode eval --config.eval.protocol=semseg`.

Fits:     one GPU of 80 GB: the compiled program needs 43.7 GiB on an H100. depth=101 needs
          bfloat16 there: 39.6 of 59.3 GiB; in float32 it needs 60.2. In bfloat16 it fits on one
          v5e TPU chip: 14.7 of 15.75 GiB. On v5e:2x2 it needs 7.6 GiB a chip, on v5e:2x4 6.7 at
          depth=101 (docs/scale.md).

Data:     leftImg8bit and gtFine in `data/cityscapes` (or --config.data.root=DIR), with the
          *_labelTrainIds.png that csCreateTrainIdLabelImgs of cityscapesscripts makes. Run this in
          that folder to make the lists, of 2,975 and 500 lines:

  for split in train val; do
      (cd leftImg8bit/$split && ls */*.png) | sed "s|_leftImg8bit.png||; s|.*|leftImg8bit/$split/&\
_leftImg8bit.png gtFine/$split/&_gtFine_labelTrainIds.png|" > fine_$split.txt; done

          Lists of the original *_labelIds.png need --config.data.label_map=cityscapes_ids.
          coarse_train_extra.txt is the same for leftImg8bit/train_extra and gtCoarse/train_extra.

          source=tfds needs none of this. Put leftImg8bit_trainvaltest.zip and
          gtFine_trainvaltest.zip (and leftImg8bit_trainextra.zip and gtCoarse.zip) of
          cityscapes-dataset.com into a folder and run
          `python -m psp_jax.datasets cityscapes --manual_dir FOLDER`.
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
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269
    config.eval.base_size = 2048  # pixels, the long side, rounded to the nearest 8n + 1
    config.eval.batch_size = 2  # images of 2 megapixels
    return config

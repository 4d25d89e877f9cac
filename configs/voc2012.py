"""PSPNet on PASCAL VOC 2012's 21 classes, trained on the augmented set of 10,582 images.

Command:  python -m psp_jax.main --config configs/voc2012.py:depth=101

          Training with COCO takes two stages (the paper: 85.4 mIoU on the test set):

          python -m psp_jax.main --config configs/voc2012.py:depth=101,pretrain=coco \
              --workdir runs/coco
          python -m psp_jax.main --config configs/voc2012.py:depth=101,source=tfds \
              --config.init_from=runs/coco

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269
  recipe=paper      paper: 30,000 steps; semseg (the authors' PyTorch code): 33,050 steps
  pretrain=none     none, or coco: the first of two stages, on COCO with VOC's classes, for 150,000
                    steps (about 26 epochs; the paper does not give a number, this is our choice)
  source=list       list: the files below; tfds: the data set that psp_jax.datasets makes

Expect:   published validation mIoU / pixel accuracy (semseg's README), by sliding windows at a
          single scale: PSPNet-50 77.05 / 94.89, PSPNet-101 79.07 / 95.34. The paper reports the
          test set: 82.6 mIoU with PSPNet-101 at several scales. All start from ImageNet weights. So
          does this: timm's resnet50s, 101s or 152s, downloaded from the Hugging Face Hub.
          Evaluations during training use whole images, 513 pixels long. For the published way use
          `--mode eval --config.eval.protocol=semseg`.

Fits:     one GPU of 80 GB: the compiled program needs 19.3 GiB on an H100, 34.7 at depth=101. In
          bfloat16 it fits on one v5e TPU chip: 9.5 of 15.75 GiB. On v5e:2x4 it needs 2.0 GiB a
          chip, 3.4 at depth=101 (docs/scale.md).

Data:     VOCdevkit/VOC2012 in `data/voc2012` (or --config.data.root=DIR), and within it the labels
          of the Semantic Boundaries Dataset as SegmentationClassAug/*.png. Palette PNGs are fine.
          Run this in that folder to make the lists:

  sed 's|.*|JPEGImages/&.jpg SegmentationClass/&.png|' ImageSets/Segmentation/val.txt > val.txt
  ls SegmentationClassAug | sed 's|.png$||' | grep -vxFf ImageSets/Segmentation/val.txt |
      sed 's|.*|JPEGImages/&.jpg SegmentationClassAug/&.png|' > train_aug.txt

          They have 1,449 and 10,582 lines. Label 255, the border of the objects, is ignored. For
          source=tfds run `python -m psp_jax.datasets voc2012`, which downloads all of it (3.4 GB)
          and makes the same sets. For COCO run `python -m psp_jax.datasets coco_voc` (20 GB; needs
          pycocotools).
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, read_tfds, set_depth
from psp_jax.config_values import choose


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, depth=50, recipe='paper', pretrain='none', source='list')
    config = default_config()
    config.total_steps = choose('recipe', args.recipe, {'paper': 30_000, 'semseg': 33_050})

    config.data.source = 'list'
    config.data.root = 'data/voc2012'
    config.data.train = 'train_aug.txt'
    config.data.val = 'val.txt'
    config.data.classes = 'voc2012'
    config.data.crop = 473

    if choose('source', args.source, {'list': False, 'tfds': True}):
        read_tfds(config, 'voc2012', train='train_aug')
    if choose('pretrain', args.pretrain, {'none': False, 'coco': True}):
        read_tfds(config, 'coco_voc')
        config.total_steps = 150_000

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269
    config.eval.base_size = 512  # pixels, the long side, rounded to the nearest 8n + 1
    config.eval.multiple = 64  # at most 15 programs for images of hundreds of sizes
    return config

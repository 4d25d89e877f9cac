"""PSPNet on PASCAL VOC 2012's 21 classes, trained on the augmented set of 10,582 images.

Command:  python -m psp_jax.main --config configs/voc2012.py:depth=101

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269
  recipe=paper      paper: 30,000 steps; semseg (the authors' PyTorch code): 33,050 steps

Expect:   published validation mIoU / pixel accuracy (semseg's README), by sliding windows at a
          single scale: PSPNet-50 77.05 / 94.89, PSPNet-101 79.07 / 95.34. The paper reports the
          test set: 82.6 mIoU with PSPNet-101 at several scales. Each started from ImageNet weights,
          as this does: timm's resnet50s, 101s or 152s, fetched from the Hugging Face Hub.
          Evaluations during training see images in one piece, 513 pixels long; the published way is
          `--mode eval --config.eval.protocol=semseg`.

Data:     VOCdevkit/VOC2012 in `data/voc2012` (or --config.data.root=DIR), and within it the labels
          of the Semantic Boundaries Dataset as SegmentationClassAug/*.png. Palette PNGs are fine.
          The lists are made in that folder by

  sed 's|.*|JPEGImages/&.jpg SegmentationClass/&.png|' ImageSets/Segmentation/val.txt > val.txt
  ls SegmentationClassAug | sed 's|.png$||' | grep -vxFf ImageSets/Segmentation/val.txt |
      sed 's|.*|JPEGImages/&.jpg SegmentationClassAug/&.png|' > train_aug.txt

          and have 1,449 and 10,582 lines. Label 255, the objects' border, is ignored.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, set_depth
from psp_jax.legal import choose


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, depth=50, recipe='paper')
    config = default_config()
    config.total_steps = choose('recipe', args.recipe, {'paper': 30_000, 'semseg': 33_050})

    config.data.source = 'list'
    config.data.root = 'data/voc2012'
    config.data.train = 'train_aug.txt'
    config.data.val = 'val.txt'
    config.data.classes = 'voc2012'
    config.data.crop = 473

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269: none are public
    config.eval.base_size = 512  # pixels, the long side; it becomes the nearest 8n + 1
    config.eval.multiple = 64  # the images have hundreds of sizes: at most 15 programs
    return config

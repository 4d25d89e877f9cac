"""PSPNet on ADE20K's 150 classes (scene parsing challenge 2016): the paper's main experiment.

Command:  python -m psp_jax.main --config configs/ade20k.py
          python -m psp_jax.main --config configs/ade20k.py:depth=101,recipe=semseg
          docs/ablations.md has a command for each row of the paper's tables.

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269
  recipe=paper      paper: 150,000 steps; semseg (the authors' PyTorch code): 126,300 steps
  bins=(1,2,3,6)    grids of the pyramid; () = the dilated FCN, the paper's baseline
  pool=average      average | max
  reduce=true       false = no 1x1 convolutions in the pyramid
  aux=0.4           weight of the auxiliary loss; 0 = no auxiliary head
  augment=true      false = crops only: no scaling, rotation, blur or mirroring
  source=dirs       dirs: the folders below; tfds: the data set that psp_jax.datasets makes

Expect:   published validation mIoU / pixel accuracy, by sliding windows at a single scale:
          PSPNet-50 41.68 / 80.04 (paper, Table 3) and 41.89 / 80.39 (semseg's README),
          PSPNet-101 41.96 / 80.64 and 43.10 / 81.07. All start from ImageNet weights. So
          does this: timm's resnet50s, 101s or 152s, downloaded from the Hugging Face Hub.
          Evaluations during training use whole images, 513 pixels long. For the published way use
          `--mode eval --config.eval.protocol=semseg`.

Fits:     one GPU of 80 GB: the compiled program needs 19.3 GiB on an H100, 34.8 at depth=101. In
          bfloat16 it fits on one v5e TPU chip: 9.5 of 15.75 GiB. On v5e:2x4 it needs 2.0 GiB a
          chip, 3.4 at depth=101 (docs/scale.md).

Data:     the folders of ADEChallengeData2016 in `data/ade20k` (or --config.data.root=DIR):
          images/{training,validation}/*.jpg and annotations/{training,validation}/*.png,
          20,210 and 2,000 pairs. Label 0 ('other') is ignored, 1 to 150 become 0 to 149. For
          source=tfds run `python -m psp_jax.datasets ade20k`, which downloads the archive (0.9 GB).
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, read_tfds, set_depth
from psp_jax.config_values import choose


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(
        arg,
        depth=50,
        recipe='paper',
        bins=(1, 2, 3, 6),
        pool='average',
        reduce=True,
        aux=0.4,
        augment=True,
        source='dirs',
    )
    config = default_config()
    config.total_steps = choose('recipe', args.recipe, {'paper': 150_000, 'semseg': 126_300})

    config.data.source = 'dirs'
    config.data.root = 'data/ade20k'
    config.data.train = 'images/training,annotations/training'
    config.data.val = 'images/validation,annotations/validation'
    config.data.classes = 'ade20k'
    config.data.label_map = 'minus_one'
    config.data.crop = 473
    if choose('source', args.source, {'dirs': False, 'tfds': True}):
        read_tfds(config, 'ade20k')
    if not args.augment:
        config.data.scale = (1.0, 1.0)
        config.data.rotate = 0.0
        config.data.blur = 0.0
        config.data.mirror = 0.0

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269
    config.model.bins = args.bins
    config.model.pool = args.pool
    config.model.reduce = args.reduce
    config.loss.aux_weight = args.aux
    config.eval.base_size = 512  # pixels, the long side, rounded to the nearest 8n + 1
    config.eval.multiple = 64  # at most 15 programs for images of hundreds of sizes
    return config

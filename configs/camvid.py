"""PSPNet-18 from scratch on CamVid's eleven classes: real photographs on a laptop.

Command:  python -m psp_jax.main --config configs/camvid.py

Arguments:
  depth=18          18 | 34 | 50 | 101 | 152 | 269
  seed=0
  source=list       list: the files below; tfds: the data set that psp_jax.datasets makes

Expect:   about 0.40 mIoU and 0.85 pixel accuracy on the 101 validation images after 800 steps of
          batch 8, without pretrained weights.

Fits:     any device: the compiled program needs 0.5 GiB on a GPU (docs/scale.md).

Data:     SegNet's form of CamVid, 480 x 360, in `data/camvid` (or --config.data.root=DIR):
          images/{train,val}/*.jpg or .png, labels/{train,val}/*.png with ids 0 to 10 and 11 = void,
          and the lists train.txt (367 lines) and val.txt (101) of lines 'image label'.

The validation frames are nearly consecutive frames of one clip: a difference of a point is noise.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, parse_arg, read_tfds, set_depth
from psp_jax.config_values import choose


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, depth=18, seed=0, source='list')
    config = default_config()
    config.seed = args.seed
    config.batch_size = 8
    config.total_steps = 800
    config.eval_every = 200
    config.checkpoint_every = 200
    config.log_every = 10

    config.data.source = 'list'
    config.data.root = 'data/camvid'
    config.data.train = 'train.txt'
    config.data.val = 'val.txt'
    config.data.classes = 'camvid'
    config.data.label_map = '{11: 255}'  # void
    config.data.crop = 193
    if choose('source', args.source, {'list': False, 'tfds': True}):
        read_tfds(config, 'camvid')
    config.data.scale = (0.5, 2.0)
    config.data.rotate = 10.0
    config.data.blur = 0.5

    set_depth(config, args.depth)
    config.init_from = ''  # random weights
    config.optimizer.learning_rate = 0.01
    config.optimizer.recipe_batch_size = 8
    config.eval.base_size = 481  # 480 x 360 becomes 481 x 361, the nearest 8n + 1
    return config

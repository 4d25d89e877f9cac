"""PSPNet-18 on the built-in scenes: nothing to download, minutes on a CPU.

The scenes are drawn when they are read. The same object is a car in a street and a boat in a
harbour, and only the far side of the image shows which of the two (paper, section 3.1).

Command:  python -m psp_jax.main --config configs/scenes.py
          python -m psp_jax.main --config 'configs/scenes.py:bins=()'     the plain dilated FCN

Arguments:
  bins=(1,2,3,6)    grids of the pyramid; () = the plain dilated FCN
  seed=0
  steps=360         training steps
  depth=18          10 | 18 | 34 | 50 | 101 | 152 | 269

Expect:   mIoU of 0.80 or more on 200 scenes that training never uses, in about 5 minutes on two
          CPU cores.

Fits:     any device: the compiled program needs 0.3 GiB on a GPU (docs/scale.md).
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, parse_arg, set_depth


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, bins=(1, 2, 3, 6), seed=0, steps=360, depth=18)
    config = default_config()
    config.seed = args.seed
    config.batch_size = 4
    config.total_steps = args.steps
    config.eval_every = 180
    config.checkpoint_every = 180
    config.log_every = 20

    config.data.source = 'scenes'
    config.data.train = '0:20000'
    config.data.val = '1000000:1000200'
    config.data.classes = 'scenes'
    config.data.crop = (65, 129)
    # A scene is rarely used twice, so augmentation would add nothing.
    config.data.scale = (1.0, 1.0)
    config.data.rotate = 0.0
    config.data.blur = 0.0

    set_depth(config, args.depth)
    config.init_from = ''  # random weights
    config.model.bins = args.bins
    config.optimizer.learning_rate = 0.02
    config.optimizer.recipe_batch_size = 4
    return config

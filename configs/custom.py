"""PSPNet on your own images: copy this file, and change what is marked.

Command:  python -m psp_jax.main --config configs/custom.py --workdir runs/mine

Arguments:
  depth=50          18 | 34 | 50 | 101 | 152 | 269; 18 is the one for a small machine
  steps=20000       training steps

Data:     a folder of images and a folder of label maps for each split. A label map is a PNG of its
          image's size and name, whose values are class ids: 0, 1, 2, ... in the order of
          data.classes, and 255 for pixels that do not count. A palette PNG is read as its indices.

Expect:   nothing yet. If validation mIoU stays near 1 / classes, look at data.label_map first.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, parse_arg, set_depth


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, depth=50, steps=20_000)
    config = default_config()
    config.batch_size = 16  # CHANGE if memory is short: learning_rate in proportion
    config.total_steps = args.steps
    config.eval_every = 1_000

    config.data.source = 'dirs'  # or 'list', for files of lines 'image label'
    config.data.root = 'data/custom'  # CHANGE
    config.data.train = 'images/train,labels/train'  # CHANGE
    config.data.val = 'images/val,labels/val'  # CHANGE
    config.data.classes = 'background,object'  # CHANGE: names in the order of their ids
    config.data.label_map = ''  # CHANGE if values are not class ids: '{0: 255, 7: 1}'
    config.data.crop = 473  # CHANGE to 8n + 1, about the size that images have

    set_depth(config, args.depth)
    # CHANGE to pretrained weights; 'hf://timm/resnet50s.gluon_in1k' fits depth 50
    config.init_from = ''
    config.eval.base_size = 0  # CHANGE to a number of pixels if images are large
    return config

"""PSPNet on your own images. docs/your_data.md explains each step.

Command:  python -m psp_jax.main --config configs/custom.py:root=data/mine \
              --config.data.classes=road,tree,car --workdir runs/mine

          This needs no edits. For more than a first try, copy this file and change the marked
          lines; the copy then records what you ran.

Arguments:
  root=data/custom  the folder with your data
  source=dirs       dirs: the folders images/{train,val} and labels/{train,val}, with the same
                    file names; list: the files train.txt and val.txt, lines of 'image label'
  depth=50          18 | 34 | 50 | 101 | 152 | 269; take 18 on a small machine
  steps=20000       training steps

Data:     images and label maps of the same size. A label map is a PNG whose values are class ids:
          0, 1, 2, ... in the order of data.classes, and 255 for pixels to ignore. The values of a
          palette PNG are its indices. `python -m psp_jax.data.convert` makes label maps and lists
          from the files of annotation tools.

Expect:   results depend on your data. If validation mIoU stays near 0, check data.label_map first.

Fits:     one GPU of 80 GB: the compiled program needs 19.3 GiB on an H100 (docs/scale.md). With a
          smaller batch_size it fits on smaller ones: about 1.2 GiB an image.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, set_depth
from psp_jax.config_values import choose

LAYOUTS = {
    'dirs': ('images/train,labels/train', 'images/val,labels/val'),
    'list': ('train.txt', 'val.txt'),
}


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, root='data/custom', source='dirs', depth=50, steps=20_000)
    config = default_config()
    config.batch_size = 16  # CHANGE if memory is short, and learning_rate in proportion
    config.total_steps = args.steps
    config.eval_every = 1_000

    config.data.source = args.source
    config.data.root = args.root  # CHANGE
    config.data.train, config.data.val = choose('source', args.source, LAYOUTS)
    config.data.classes = 'background,object'  # CHANGE: the names, in the order of their ids
    config.data.label_map = ''  # CHANGE if values are not class ids: '{0: 255, 7: 1}'
    config.data.crop = 473  # CHANGE to 8n + 1, about the size of the images

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)  # '' for 18, 34 and 269
    config.eval.base_size = 0  # CHANGE to a number of pixels if images are large
    config.eval.multiple = 64  # few programs, even if the images have many sizes
    return config

"""PSPNet on Oxford-IIIT Pet: cats and dogs in real photographs, for one GPU or TPU and minutes.

Command:  python -m psp_jax.datasets oxford_iiit_pet
          python -m psp_jax.main --config configs/pets.py

          notebooks/pets.ipynb does the same in Colab.

Arguments:
  border=ignore     the outline of the animals, which the data set leaves open. ignore: it counts
                    neither in the loss nor in the scores; class: a third class `border`
  depth=18          18 | 34 | 50 | 101 | 152 | 269
  steps=2000        training steps of 16 images; 2,000 are 8.7 epochs

Expect:   nothing yet: we have not trained on the photographs themselves. Every depth but 269 starts
          from public ImageNet weights, fetched from the Hugging Face Hub: 18 and 34 from timm's
          copy of torchvision's, the others from timm's resnet50s, 101s or 152s.

Fits:     any device: 1.2 GiB of a card as compiled (docs/scale.md).

Data:     `python -m psp_jax.datasets oxford_iiit_pet` downloads it (800 MB) and prepares it with
          TFDS's own builder: `train` has 3,680 photographs of 37 breeds, `test` 3,669. Most are
          about 500 pixels long. Stored are 1 = pet, 2 = background, 3 = border; another folder of
          TFDS's is --config.data.root=DIR.

The scores are of `test`, each evaluation of all of it: --config.data.val='test[:200]' is quicker.
"""

from ml_collections import ConfigDict

from psp_jax.config import default_config, imagenet_weights, parse_arg, read_tfds, set_depth
from psp_jax.config_values import choose

BORDERS = {
    'ignore': ('background,pet', '{2: 0, 3: 255}'),
    'class': ('background,pet,border', '{2: 0, 3: 2}'),
}


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, border='ignore', depth=18, steps=2_000)
    config = default_config()
    config.batch_size = 16
    config.total_steps = args.steps
    config.eval_every = 1_000
    config.checkpoint_every = 500
    config.log_every = 20

    read_tfds(config, 'oxford_iiit_pet', val='test')
    config.data.classes, config.data.label_map = choose('border', args.border, BORDERS)
    config.data.crop = 257
    config.data.scale = (0.5, 1.25)  # more, and a crop holds nothing but fur

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)
    if args.depth in (18, 34):  # torchvision's, whose stem is one convolution
        config.model.stem = 'conv7'
        config.init_from = f'hf://timm/resnet{args.depth}.tv_in1k'
    config.eval.base_size = 384  # pixels, the long side, amid the scales of training
    config.eval.multiple = 64  # the photographs have many sizes: few programs
    return config

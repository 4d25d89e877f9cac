"""PSPNet on Oxford-IIIT Pet: cats and dogs in photographs, minutes on one GPU or TPU.

Command:  python -m psp_jax.datasets oxford_iiit_pet
          python -m psp_jax.main --config configs/pets.py

          notebooks/pets.ipynb does the same in Colab.

Arguments:
  border=ignore     how to use the outline of the animals, whose label means 'undecided'.
                    ignore: it counts neither in the loss nor in the scores; class: a third class
  depth=18          18 | 34 | 50 | 101 | 152 | 269
  steps=2000        training steps of 16 images; 2,000 are 8.7 epochs

Expect:   no result yet: we have not trained on the photographs. Every depth but 269 starts from
          public ImageNet weights, downloaded from the Hugging Face Hub: 18 and 34 from timm's copy
          of torchvision's, the others from timm's resnet50s, 101s or 152s.

Fits:     any device: the compiled program needs 1.2 GiB on a GPU (docs/scale.md).

Data:     `python -m psp_jax.datasets oxford_iiit_pet` downloads it (800 MB) and prepares it with
          TFDS's own builder: `train` has 3,680 photographs of 37 breeds, `test` 3,669. Most are
          about 500 pixels long. The stored labels are 1 = pet, 2 = background, 3 = border. For
          another folder of TFDS set --config.data.root=DIR.

Each evaluation uses all of `test`. --config.data.val='test[:200]' is quicker.
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
    config.data.scale = (0.5, 1.25)  # at larger scales a crop shows only fur

    set_depth(config, args.depth)
    config.init_from = imagenet_weights(args.depth)
    if args.depth in (18, 34):  # torchvision's networks have a stem of one convolution
        config.model.stem = 'conv7'
        config.init_from = f'hf://timm/resnet{args.depth}.tv_in1k'
    config.eval.base_size = 384  # pixels, the long side, in the middle of the training scales
    config.eval.multiple = 64  # few programs for photographs of many sizes
    return config

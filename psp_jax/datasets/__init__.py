"""TFDS builders of the data sets that TFDS lacks; `python -m psp_jax.datasets NAME` runs them."""

# Module of this package: class in it.
BUILDERS = {
    'ade20k': 'Ade20k',
    'camvid': 'Camvid',
    'cityscapes': 'Cityscapes',
    'coco_voc': 'CocoVoc',
    'voc2012': 'Voc2012',
}

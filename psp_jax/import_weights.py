"""Writes weights of other code bases as a checkpoint.

    python -m psp_jax.import_weights SOURCE [SOURCE2] --config configs/X.py --output DIR

A source is a `.pth`, `.pt` or `.safetensors` file, `hf://OWNER/NAME[/FILE]`, or a checkpoint of
psp_jax: a working directory (its newest checkpoint) or a checkpoint's own path. Its format follows
from the names in it (weights/formats.py). weights/load.py says what must fit.
"""

import sys
from collections.abc import Sequence

from psp_jax.command_line import Parser, exit_code, quieten_libraries, split_overrides
from psp_jax.config import to_json
from psp_jax.config_check import load_config
from psp_jax.errors import UserError


def run(argv: Sequence[str]) -> None:
    """Does what the flags say. Raises UserError for a wrong flag or weights that do not fit."""
    overrides, words = split_overrides(argv)
    parser = Parser(
        prog='python -m psp_jax.import_weights',
        description='Writes weights of semseg, mmsegmentation, CSAIL, torchvision or timm as a '
        'checkpoint. --mode eval reads it, and training starts from it by --config.init_from=DIR.',
    )
    parser.add_argument(
        'sources',
        nargs='+',
        metavar='SOURCE',
        help='.pth, .pt, .safetensors or hf://OWNER/NAME[/FILE]; two for CSAIL (encoder, decoder)',
    )
    parser.add_argument('--config', required=True, metavar='FILE[:ARGS]', help='the network')
    parser.add_argument('--output', required=True, metavar='DIR', help='a new folder')
    flags = parser.parse_args(words)
    source = f'--config.init_from={",".join(flags.sources)}'
    config = load_config(flags.config, [*overrides, source])
    quieten_libraries()
    # JAX and orbax take seconds to import; errors in the flags above come at once.
    import jax
    from flax.traverse_util import unflatten_dict

    from psp_jax.runtime import checkpoint
    from psp_jax.state import jit_for_one_call, new_state, setup
    from psp_jax.weights.load import load_weights

    folder = checkpoint.directory(flags.output)
    if folder.exists() and any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(f'--output={flags.output}: holds checkpoints already; name another folder')
    network = setup(config)
    wanted = checkpoint.named_leaves(network.variables)
    weights = load_weights(config.init_from, config, wanted)

    def make_fresh() -> dict[str, jax.Array]:
        leaves = checkpoint.named_leaves(new_state(network).variables)
        return {name: leaves[name] for name in wanted.keys() - weights.arrays.keys()}

    arrays = weights.arrays | jit_for_one_call(make_fresh)()
    variables = unflatten_dict(arrays, sep='/')
    checkpoint.save_variables(flags.output, variables, {'config': to_json(config)})
    print('\n'.join([*weights.report, f'written to {folder / "0"}']))


if __name__ == '__main__':
    sys.exit(exit_code(run))

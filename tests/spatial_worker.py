"""Training steps of images that are split in height over devices: for test_spatial.py.

python tests/spatial_worker.py steps OUTPUT.npz CROP BATCH STEPS MESH... [--config.key=value ...]
python tests/spatial_worker.py collectives OUTPUT.json CROP BATCH MESH... [--config.key=value ...]
python tests/spatial_worker.py process PORT INDEX

A mesh is written as 4x2: data x space. 'native' among them takes the kernel gradients that
accelerators take; 'quick' has programs compiled fast that run slowly.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from networks import SMALL

from psp_jax.config_check import resolve
from psp_jax.mesh import (
    cut_images,
    make_mesh,
    on_devices,
    padded_height,
    put_images,
    replicated,
    split_images,
)
from psp_jax.model import layers
from psp_jax.runtime.checkpoint import named_leaves
from psp_jax.state import setup
from psp_jax.train import compile_step

# What moves between devices is decided before the part that this hurries.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
MOVED = (
    'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
    '|ragged-all-to-all'
)


def config_of(crop, batch_size, overrides):
    widths = {'model.head_width': 32, 'model.aux_width': 16}
    sizes = {'batch_size': batch_size, 'total_steps': 3, 'data.crop': crop, 'data.classes': '7'}
    return resolve(SMALL | widths | sizes, overrides)


def batch_of_step(step, config):
    """Images with an unequal share of ignored pixels each; one is ignored as a whole."""
    rng = np.random.default_rng(step)
    count, crop = config.batch_size, config.data.crop
    labels = rng.integers(0, 7, (count, crop, crop)).astype(np.uint8)
    for row in range(count):
        labels[row, : row * 4] = 255
    labels[step % count] = 255
    images = rng.integers(0, 256, (count, crop, crop, 3)).astype(np.uint8)
    return images, labels


def with_garbage(image, label, mesh):
    """`put_images` with other things below the images than zeros."""
    placed = put_images(image, label, mesh)
    below = np.arange(placed['image'].shape[1]) >= image.shape[1]
    garbage = np.where(below[:, None, None], np.uint8(7), placed['image'])
    return placed | {'image': jax.device_put(garbage, split_images(mesh))}


def program(config, mesh, options=None):
    """The compiled step and the shapes of its state; nothing is allocated."""
    run = setup(config)
    state = on_devices(run.shapes, mesh)
    crop, sharding = config.data.crop, split_images(mesh)
    shape = config.batch_size, padded_height(crop, mesh), crop
    batch = {
        'image': jax.ShapeDtypeStruct((*shape, 3), np.uint8, sharding=sharding),
        'label': jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding),
    }
    return compile_step(run, mesh).lower(state, batch).compile(compiler_options=options), state


def native_kernel_gradient(x, dy, kernel, stride, dilation):
    return jax.vjp(lambda k: layers.native_conv(x, k, stride, dilation), kernel)[1](dy)[0]


def state_like(shapes):
    """A state to start from, from NumPy: the real initialisation takes long to compile."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name, is_state = getattr(path[-1], 'key', ''), path[0].name != 'opt_state'
        if name == 'kernel' and is_state:
            value = rng.normal(scale=np.prod(x.shape[:-1]) ** -0.5, size=x.shape)
        else:
            value = np.full(x.shape, name in ('scale', 'var') and is_state)
        return jax.device_put(value.astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def collectives_of(compiled):
    """[kind, elements of the largest result, op_name] of each collective in the program."""
    listed = []
    for line in compiled.as_text().splitlines():
        match = re.match(rf'\s*(?:ROOT )?%?\S+ = (.*?) ({MOVED})(?:-start)?\(', line)
        if match:
            shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
            sizes = [math.prod(int(n) for n in s.split(',') if n) for s in shapes]
            op_name = re.search(r'op_name="([^"]*)"', line)
            listed.append([match[2], max(sizes), op_name[1] if op_name else ''])
    return listed


def steps(output, crop, batch_size, count, meshes, overrides, options=None):
    """For each mesh 'MESH/losses', the state after the steps, 'MESH/collectives' as JSON and, with
    padding other than zeros, 'MESH/garbage' losses.
    """
    config = config_of(crop, batch_size, ['--config.dtype=float64', *overrides])
    found = {}
    for data, space in meshes:
        mesh = make_mesh(data, batch_size, space)
        step_fn, shapes = program(config, mesh, options)
        name = f'{data}x{space}'
        found[f'{name}/collectives'] = np.array(json.dumps(collectives_of(step_fn)))
        for put in (put_images, with_garbage) if space > 1 else (put_images,):
            state, losses = state_like(shapes), []
            for step in range(count if put is put_images else 1):
                state, scalars = step_fn(state, put(*batch_of_step(step, config), mesh))
                losses.append([float(scalars[x]) for x in ('loss', 'loss_main', 'loss_aux')])
            found[f'{name}/{"losses" if put is put_images else "garbage"}'] = np.array(losses)
            if put is put_images:
                found |= {f'{name}/{k}': np.asarray(v) for k, v in named_leaves(state).items()}
    np.savez(output, **found)


def collectives(output, crop, batch_size, meshes, overrides):
    """For each mesh its program's collectives, [kind, elements of the largest result, op_name]."""
    config = config_of(crop, batch_size, overrides)
    found = {}
    for data, space in meshes:
        compiled = program(config, make_mesh(data, batch_size, space), QUICK)[0]
        found[f'{data}x{space}'] = collectives_of(compiled)
    with open(output, 'w') as file:
        json.dump(found, file)


def process(port, index):
    """One of two processes with four devices each: whether its shards are of its own rows."""
    jax.config.update('jax_num_cpu_devices', 4)
    jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=index)
    mesh = make_mesh(-1, 8, 2)
    assert dict(mesh.shape) == {'data': 4, 'space': 2}
    images = np.random.default_rng(0).integers(1, 255, (8, 41, 5, 3)).astype(np.uint8)
    labels = np.random.default_rng(1).integers(1, 7, (8, 41, 5)).astype(np.uint8)
    own = slice(4 * index, 4 * index + 4)
    batch = put_images(images[own], labels[own], mesh)
    padding = {
        'image': np.zeros((8, 7, 5, 3), np.uint8),
        'label': np.full((8, 7, 5), 255, np.uint8),
    }
    for name, x in (('image', images), ('label', labels)):
        x = np.concatenate([x, padding[name]], 1)
        assert batch[name].shape == x.shape
        shards = batch[name].addressable_shards
        assert len(shards) == 4
        for shard in shards:
            assert 4 * index <= shard.index[0].start < 4 * index + 4
            np.testing.assert_array_equal(shard.data, x[shard.index])
    assert batch['image'].addressable_shards[0].data.shape == (2, 24, 5, 3)

    def pixels(batch):
        cut = cut_images(batch, 41, mesh)['image']
        return jnp.sum(cut.astype(int), (0, 1, 2))

    found = jax.jit(pixels, out_shardings=replicated(mesh))(batch)
    np.testing.assert_array_equal(found, images.astype(int).sum((0, 1, 2)))


def main(task, *words):
    if task == 'process':
        process(int(words[0]), int(words[1]))
        return
    jax.config.update('jax_num_cpu_devices', 8)
    if 'native' in words:
        layers.kernel_gradient_by_shifts = native_kernel_gradient
    meshes = [tuple(map(int, w.split('x'))) for w in words if re.fullmatch(r'\d+x\d+', w)]
    overrides = [word for word in words if word.startswith('--config.')]
    numbers = [int(word) for word in words if word.isdecimal()]
    if task == 'steps':
        options = QUICK if 'quick' in words else None
        steps(words[0], *numbers, meshes, overrides, options)
    else:
        collectives(words[0], *numbers, meshes, overrides)


if __name__ == '__main__':
    main(*sys.argv[1:])

"""The optimizers against their updates written out in numpy, the schedule, and the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from psp_jax import optimizer
from psp_jax.config import default_config

PARAMS = {
    'backbone': {'conv1': {'kernel': 1.0}, 'bn1': {'scale': 2.0, 'bias': -1.0}},
    'pyramid': {'level0_conv': {'kernel': 0.5}, 'level0_bn': {'scale': 1.0}},
    'head': {'classifier': {'kernel': 3.0, 'bias': 0.25}},
    'aux_head': {'conv': {'kernel': -0.5}},
}


def tree(function):
    return {
        a: {b: {c: function(a, c, v) for c, v in inner.items()} for b, inner in middle.items()}
        for a, middle in PARAMS.items()
    }


def config_of(**options):
    config = default_config()
    config.total_steps = 7
    for name, value in options.items():
        config.optimizer[name] = value
    return config


def run_beside_numpy(config, rule):
    """Seven steps on made-up gradients; rule(slot, p, g, step, rate, decay) gives numpy's p."""
    params = tree(lambda a, c, v: jnp.full((2,), v))
    tx, schedule = optimizer.make_optimizer(params, config)
    state, expected = tx.init(params), tree(lambda a, c, v: v)
    slots = tree(lambda a, c, v: [0.0, 0.0])
    rng = np.random.default_rng(0)
    decay_all = config.optimizer.decay_norm_and_bias
    for step in range(7):
        slopes = tree(lambda a, c, v: rng.normal())
        gradients = jax.tree.map(lambda g: jnp.full((2,), g), slopes)
        rate = 0.01 * (1 - step / 7) ** 0.9
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for a, middle in PARAMS.items():
            for b, inner in middle.items():
                for c in inner:
                    own = rate * (1.0 if a == 'backbone' else 10.0)
                    decay = 0.1 if decay_all or c == 'kernel' else 0.0
                    arguments = expected[a][b][c], slopes[a][b][c], step, own, decay
                    expected[a][b][c] = rule(slots[a][b][c], *arguments)
                    np.testing.assert_allclose(params[a][b][c], expected[a][b][c], rtol=1e-4)


@pytest.mark.parametrize('decay_all', [True, False])
def test_updates_equal_sgd_written_out(decay_all):
    """PyTorch's form, with everything outside the backbone ten times as fast."""

    def sgd(slot, p, g, step, rate, decay):
        slot[0] = 0.9 * slot[0] + g + decay * p
        return p - rate * slot[0]

    run_beside_numpy(config_of(weight_decay=0.1, decay_norm_and_bias=decay_all), sgd)


def test_updates_equal_adamw_written_out():
    def adamw(slot, p, g, step, rate, decay):
        slot[0] = 0.9 * slot[0] + 0.1 * g
        slot[1] = 0.999 * slot[1] + 0.001 * g**2
        mean, square = slot[0] / (1 - 0.9 ** (step + 1)), slot[1] / (1 - 0.999 ** (step + 1))
        return p - rate * (mean / (square**0.5 + 1e-8) + decay * p)

    run_beside_numpy(config_of(name='adamw', weight_decay=0.1), adamw)


def test_poly_rate_is_the_references_at_known_steps():
    config = default_config()
    config.total_steps = 126_300
    schedule = optimizer.make_schedule(config)
    rates = [float(schedule(n)) for n in (0, 63_150)]
    assert rates == [pytest.approx(0.01), pytest.approx(0.00535887, rel=1e-5)]
    # 1 - n / total has few digits left in float32; the rate is next to nothing by then.
    assert float(schedule(126_299)) == pytest.approx(2.6e-7, rel=0.05)


def test_warmup_rises_linearly_to_the_poly_rate():
    config = config_of(warmup_steps=4)
    config.total_steps = 10**9
    schedule = optimizer.make_schedule(config)
    rates = [float(schedule(n)) for n in range(6)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-5)


def test_the_table_counts_every_parameter_once():
    options = config_of(decay_norm_and_bias=False).optimizer
    params = tree(lambda a, c, v: jnp.zeros((3,)))
    rows = [line.split() for line in optimizer.table(params, options).splitlines()[1:]]
    assert sum(int(row[-3]) for row in rows) == 24
    assert sorted(row[-2:] for row in rows) == [
        ['0.01', '0'],
        ['0.01', '0.0001'],
        ['0.1', '0'],
        ['0.1', '0.0001'],
    ]

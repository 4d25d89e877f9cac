"""SGD against the update written out in numpy, and the groups' table."""

import jax.numpy as jnp
import numpy as np
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


@pytest.mark.parametrize('decay_all', [True, False])
def test_updates_equal_sgd_written_out(decay_all):
    config = default_config()
    config.optimizer.decay_norm_and_bias = decay_all
    config.optimizer.weight_decay = 0.1
    total, base = 7, config.optimizer.learning_rate
    params = tree(lambda a, c, v: jnp.full((2,), v))
    tx = optimizer.make_optimizer(params, config.optimizer)
    state = tx.init(params)
    expected = tree(lambda a, c, v: v)
    momentum = tree(lambda a, c, v: 0.0)
    rng = np.random.default_rng(0)
    for step in range(total):
        slopes = tree(lambda a, c, v: rng.normal())
        gradients = tree(lambda a, c, v: None)
        rate = base * (1 - step / total) ** 0.9
        for a in PARAMS:
            for b in PARAMS[a]:
                for c in PARAMS[a][b]:
                    g = slopes[a][b][c]
                    gradients[a][b][c] = jnp.full((2,), g)
                    decay = 0.1 if decay_all or c == 'kernel' else 0.0
                    times = 1.0 if a == 'backbone' else 10.0
                    momentum[a][b][c] = 0.9 * momentum[a][b][c] + g + decay * expected[a][b][c]
                    expected[a][b][c] -= rate * times * momentum[a][b][c]
        updates, state = tx.update(gradients, state, params)
        got = optimizer.learning_rate(jnp.asarray(step), config.optimizer, total)
        assert float(got) == pytest.approx(rate, rel=1e-5)
        for a in PARAMS:
            for b in PARAMS[a]:
                for c in PARAMS[a][b]:
                    params[a][b][c] = params[a][b][c] - got * updates[a][b][c]
                    np.testing.assert_allclose(params[a][b][c], expected[a][b][c], rtol=1e-4)


def test_poly_rate_is_the_references_at_known_steps():
    config = default_config().optimizer
    rates = [float(optimizer.learning_rate(jnp.asarray(n), config, 126_300)) for n in (0, 63_150)]
    assert rates == [pytest.approx(0.01), pytest.approx(0.00535887, rel=1e-5)]
    last = float(optimizer.learning_rate(jnp.asarray(126_299), config, 126_300))
    assert last == pytest.approx(2.6e-7, rel=0.05)


def test_warmup_rises_linearly_to_the_poly_rate():
    config = default_config().optimizer
    config.warmup_steps = 4
    rates = [float(optimizer.learning_rate(jnp.asarray(n), config, 10**9)) for n in range(6)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-5)


def test_the_table_counts_every_parameter_once():
    config = default_config().optimizer
    config.decay_norm_and_bias = False
    params = tree(lambda a, c, v: jnp.zeros((3,)))
    rows = [line.split() for line in optimizer.table(params, config).splitlines()[1:]]
    assert sum(int(row[-3]) for row in rows) == 24
    assert [row[-2:] for row in rows] == [
        ['0.1', '0'],
        ['0.01', '0'],
        ['0.1', '0.0001'],
        ['0.01', '0.0001'],
    ]

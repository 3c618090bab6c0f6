"""User code without mistakes, which must pass type checkers."""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaf_optax
from gaf_optax import apply_if_agreed, gaf, multi_steps, rules, value_and_grad

w, x, y = jnp.zeros(3), jnp.ones((8, 3)), jnp.ones(8)


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.mean((x @ w - y) ** 2)


def loss_and_aux(w, x, y):
  return loss(w, x, y), x @ w


def chance(gram: jax.Array, valid: jax.Array, tau: Any) -> rules.Decision:
  return rules.Decision(valid.astype(gram.dtype), valid, jnp.zeros_like(gram[0]))


def by_layer(path: Any, leaf: jax.ShapeDtypeStruct) -> Hashable:
  return jax.tree_util.keystr(path[:1])


# Every kind of tau.
gaf()
gaf(1)
gaf(0.97)
gaf(jnp.asarray(0.97))
gaf(np.float64(0.97))
gaf(optax.linear_schedule(1.0, 0.95, 100))
gaf(lambda step: jnp.where(step < 100, 1.0, 0.97))
gaf(gaf_optax.target_accept_rate(0.5))
gaf(gaf_optax.tau_quantile(0.5), rule=rules.leave_one_out())
gaf(gaf_optax.adaptive_tau(), rule=rules.min_neighbors(0.6))

# Every option.
P = jax.sharding.PartitionSpec
gaf(0.9, rule=chance, embed=jnp.sign, groups=by_layer, num_microbatches=4)
gaf(0.9, axis_name=("replica", "data"), param_axes="model", stacked=True)
gaf(0.9, axis_name="data", param_axes={"w": P("model")}, groups="leaf")
gaf(0.9, anchor_decay=0.9)
gaf(0.9, max_norm_ratio=2)
gaf(0.9, rule=rules.majority(), max_norm_ratio=1.5)
apply_if_agreed(optax.sgd(0.1), memory_decay=0.98, num_microbatches=4)
apply_if_agreed(optax.sgd(0.1), 0.9, axis_name="data", stacked=False, groups="leaf")
multi_steps(optax.sgd(0.1), 4, anchor_decay=0.9, num_microbatches=4)
multi_steps(optax.sgd(0.1), lambda step: 4 + step // 100, rule=rules.running_average())

# Options in a dict.
options: dict[str, Any] = {"rule": rules.most_neighbors(), "num_microbatches": 4}
gaf(0.9, **options)
apply_if_agreed(optax.sgd(0.1), 0.9, **options)
optax.inject_hyperparams(gaf)(tau=0.9)

tx = optax.chain(gaf(0.97), optax.sgd(0.1))
state = tx.init(w)
updates, state = tx.update(jnp.ones((4, 3)), state, w)
w = optax.apply_updates(w, updates)
print(gaf_optax.metrics(state)["accept_rate"])

value, grads, agreement = value_and_grad(loss, 4)(w, x, y)
print(float(value), grads.shape, agreement.accepted.sum())
(value, aux), grads, agreement = value_and_grad(loss_and_aux, 4, has_aux=True)(w, x, y)
value_and_grad(jax.jit(loss), 4, argnums=(0,), batch_argnums=(1, 2), groups="leaf")
whole = functools.partial(value_and_grad, compare=lambda path, leaf: True)
whole(loss, 8, gaf_optax.adaptive_tau(), rule=rules.nearest_neighbors(5))
value_and_grad(loss, 2, axis_name="data", compare=lambda path, leaf: True)
value_and_grad(loss, 4, microbatch_weights=lambda x, y: jnp.sum(y))(w, x, y)
updates, state = tx.update(jnp.ones((4, 3)), state, w, microbatch_weights=jnp.ones(4))

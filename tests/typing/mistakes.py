"""Mistakes that a type checker must find, one per line."""

import jax.numpy as jnp
import optax

from gaf_optax import apply_if_agreed, example_weights, gaf, multi_steps, value_and_grad


def loss(w, x, y):
  return jnp.mean((x @ w - y) ** 2)


sgd = optax.sgd(0.1)
w, x, y = jnp.zeros(3), jnp.ones((8, 3)), jnp.ones(8)

gaf("0.97")  # error
gaf(rule="most_neighbors")  # error
gaf(groups="leaves")  # error
gaf(num_micro_batches=4)  # error
gaf(max_norm_ratio="2")  # error

apply_if_agreed(sgd, "0.97")  # error
apply_if_agreed(sgd, rule="most_neighbors")  # error
apply_if_agreed(sgd, anchor_decy=0.9)  # error

multi_steps(sgd, "4")  # error
multi_steps(sgd, every_k_schedule="4")  # error
multi_steps(sgd, 4, anchor_decy=0.9)  # error

value_and_grad(loss, "4")  # error
value_and_grad(loss, 4, "0.97")  # error
value_and_grad(loss, 4, has_axu=True)  # error
value_and_grad(loss, 4, rul=None)  # error
value_and_grad(loss, 4, microbatch_weights=2.0)  # error
value, grads, agreement = value_and_grad(loss, 4)(w, x, y)
print(agreement.acceptedd)  # error
both, agreement = value_and_grad(loss, 4)(w, x, y)  # error

example_weights(x, x, "0.97")  # error

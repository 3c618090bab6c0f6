"""Draws memory.png: the mean cosines of eight sources after 10, 100 and 1,000 steps.

Run as `python docs/images/draw_memory.py`, with the packages of `.[examples]`. Trains a
small network on microbatches of 4 of scikit-learn's digits; three of the eight sources
have every label shifted by one.
"""

import pathlib

import draw_gram
import jax
import matplotlib as mpl
import numpy as np
import optax

import gaf_optax

mpl.use("Agg")
from matplotlib import pyplot as plt

K, ROWS, SHOWN, SEED = 8, 4, (10, 100, 1000), 0
WRONG = (0, 4, 6)
ORDER = [*(i for i in range(K) if i not in WRONG), *WRONG]


def memories():
  """The state after each of the SHOWN numbers of steps."""
  images, labels = draw_gram.digits()
  rng = np.random.default_rng(SEED)
  sources = np.array_split(rng.permutation(len(images)), K)
  tx = gaf_optax.apply_if_agreed(
    optax.sgd(0.02, momentum=0.9),
    gaf_optax.adaptive_tau(),
    rule=gaf_optax.rules.majority(),
    memory_decay=0.98,
    num_microbatches=K,
  )

  @jax.jit
  def step(params, state, x, y):
    grads = jax.vmap(jax.grad(draw_gram.loss), (None, 0, 0))(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = draw_gram.init(jax.random.key(SEED))
  state = tx.init(params)
  for number in range(1, SHOWN[-1] + 1):
    rows = np.stack([rng.choice(source, ROWS, replace=False) for source in sources])
    y = labels[rows]
    y[WRONG, :] = (y[WRONG, :] + 1) % 10
    params, state = step(params, state, images[rows], y)
    if number in SHOWN:
      yield number, state.gaf_state


def main():
  figure, panels = plt.subplots(
    1, len(SHOWN), figsize=(11, 4), facecolor="white", layout="constrained"
  )
  figure.suptitle("mean cosine of each pair of sources (+ accepted, - rejected)")
  for axes, (number, state) in zip(panels, memories()):
    cosines = np.array(state.memory.mean[0])[np.ix_(ORDER, ORDER)]
    np.fill_diagonal(cosines, 0)
    limit = np.abs(cosines).max()
    image = axes.imshow(cosines, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_title(f"after {number:,} steps")
    names = [f"{i + 1}, wrong" if i in WRONG else f"{i + 1}" for i in ORDER]
    signs = ["+" if state.accepted[i] else "-" for i in ORDER]
    axes.set_xticks(range(K), [i + 1 for i in ORDER])
    axes.set_yticks(range(K), [f"{n} {s}" for n, s in zip(names, signs)])
    for label in axes.get_yticklabels()[-len(WRONG) :]:
      label.set_color("#b2182b")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.85)
    print(number, "steps, accepted", state.accepted)
  figure.savefig(pathlib.Path(__file__).with_name("memory.png"), dpi=112)


if __name__ == "__main__":
  main()

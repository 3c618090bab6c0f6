"""Draws gram.svg: eight micro-gradients, their distances, and the weights of a rule.

Run as `python docs/images/draw_gram.py`, with the packages of `.[examples]`. Trains a
small network on scikit-learn's digits; three of eight microbatches have every label
shifted by one. All numbers in the picture are those of one step.
"""

import pathlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from sklearn.datasets import load_digits

import gaf_optax

mpl.use("Agg")
from matplotlib import pyplot as plt

K, ROWS, STEPS, TAU, SEED = 8, 64, 200, 0.8, 0
WRONG = (0, 3, 6)  # the first one too, whom the sequential rule would follow
RULE = gaf_optax.rules.most_neighbors()
SHOWN = 48  # values of each micro-gradient, of thousands


def digits():
  images, labels = load_digits(return_X_y=True)
  return images.astype(np.float32) / 16, labels


def init(key):
  sizes = (64, 32, 10)
  keys = jax.random.split(key, len(sizes) - 1)
  return [
    {"w": jax.random.normal(k, (a, b)) * jnp.sqrt(2 / a), "b": jnp.zeros(b)}
    for k, a, b in zip(keys, sizes, sizes[1:])
  ]


def loss(params, x, y):
  hidden = jax.nn.relu(x @ params[0]["w"] + params[0]["b"])
  logits = hidden @ params[1]["w"] + params[1]["b"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def microbatches(rng, images, labels):
  rows = rng.choice(len(images), (K, ROWS), replace=False)
  y = labels[rows]
  y[WRONG, :] = (y[WRONG, :] + 1) % 10
  return jnp.asarray(images[rows]), jnp.asarray(y)


def micro_gradients():
  """Micro-gradients of the step after STEPS steps, as a list of K trees."""
  images, labels = digits()
  rng = np.random.default_rng(SEED)
  params = init(jax.random.key(SEED))
  tx = optax.chain(gaf_optax.gaf(TAU, rule=RULE), optax.sgd(0.1))
  state = tx.init(params)
  grads_of = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
  update = jax.jit(tx.update)
  for _ in range(STEPS):
    grads = grads_of(params, *microbatches(rng, images, labels))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  grads = grads_of(params, *microbatches(rng, images, labels))
  return [jax.tree.map(lambda g: g[i], grads) for i in range(K)]


def draw(rows, distances, weights, path):
  """`rows` [K, P], `distances` [K, K], `weights` [K]."""
  plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "gram", "font.size": 11})
  figure = plt.figure(figsize=(11, 5.2), facecolor="white")
  grid = figure.add_gridspec(
    2, 3, width_ratios=(3.4, 3, 2), height_ratios=(K, 1), wspace=0.3, hspace=0.42
  )
  names = [f"$g_{i + 1}$" for i in range(K)]
  mean = weights @ rows / weights.sum()
  columns = np.sort(np.argsort(-np.abs(mean))[:SHOWN])
  colours = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "aspect": "auto"}

  def shown(values):  # Each to its own scale: the distance does not see lengths.
    values = values[:, columns]
    return values / np.abs(values).max(axis=1, keepdims=True)

  stack = figure.add_subplot(grid[0, 0])
  stack.imshow(shown(rows), **colours)
  stack.set_title("micro-gradients [k, P]")
  for edge in np.arange(K - 1) + 0.5:
    stack.axhline(edge, color="white", linewidth=3)

  matrix = figure.add_subplot(grid[0, 1])
  matrix.imshow(distances, cmap="Blues_r", vmin=0, vmax=1.6, aspect="auto")
  matrix.set_title("distances, from the Gram matrix")
  for i in range(K):
    for j in range(K):
      near = distances[i, j] <= TAU
      matrix.text(
        j,
        i,
        f"{distances[i, j]:.1f}",
        ha="center",
        va="center",
        fontsize=9,
        weight="bold" if near else "normal",
        color="white" if near else "black",
      )
  matrix.set_xticks(range(K), names)

  bars = figure.add_subplot(grid[0, 2])
  accepted = weights > 0
  bars.barh(range(K), weights / weights.sum(), color="#2166ac", height=0.7)
  for i in np.flatnonzero(~accepted):
    bars.text(0.006, i, "0", va="center")
  bars.set_ylim(K - 0.5, -0.5)
  bars.set_xlim(0, 1.25 * (weights / weights.sum()).max())
  bars.set_title(f"weights, tau {TAU}")
  bars.spines[["top", "right"]].set_visible(False)

  result = figure.add_subplot(grid[1, 0])
  result.imshow(shown(mean[None]), **colours)
  result.set_title("weighted mean [P]")
  result.set_yticks([])
  for axes in (stack, result):
    axes.set_xticks([])
  labels = [f"{n}, wrong" if i in WRONG else n for i, n in enumerate(names)]
  stack.set_yticks(range(K), labels)
  for axes in (matrix, bars):
    axes.set_yticks(range(K), names)
  for axes in (stack, matrix, bars):
    for i in WRONG:
      axes.get_yticklabels()[i].set_color("#b2182b")
  for axes in (stack, matrix, result):
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)

  arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.5}
  for axes, label in ((matrix, "gram"), (bars, "rule")):
    axes.annotate(
      "", (-0.13, 1.045), (-0.27, 1.045), xycoords="axes fraction", arrowprops=arrow
    )
    axes.text(-0.2, 1.09, label, transform=axes.transAxes, ha="center", style="italic")
  bars.annotate(
    "",
    (1.02, 0.5),
    (0.5, -0.13),
    xycoords=result.transAxes,
    textcoords=bars.transAxes,
    arrowprops=arrow | {"connectionstyle": "angle,angleA=-90,angleB=180,rad=6"},
  )
  matrix.text(
    0.5, -0.275, "combine", transform=matrix.transAxes, ha="center", style="italic"
  )
  figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main():
  grads = micro_gradients()
  distance = jax.jit(gaf_optax.cosine_distance)
  distances = np.array([[distance(a, b) for b in grads] for a in grads])
  rows = jnp.stack([jax.flatten_util.ravel_pytree(g)[0] for g in grads])
  decision = RULE(rows @ rows.T, jnp.ones(K, bool), TAU)
  print(np.round(distances, 2))
  print("weights", decision.weights)
  sequential = gaf_optax.rules.sequential()(rows @ rows.T, jnp.ones(K, bool), TAU)
  print("weights of the sequential rule", sequential.weights)
  path = pathlib.Path(__file__).with_name("gram.svg")
  draw(np.asarray(rows), distances, np.asarray(decision.weights), path)


if __name__ == "__main__":
  main()

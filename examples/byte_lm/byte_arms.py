"""Arms: the ways to train that stand side by side, and what a control keeps."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gaf_optax import rules

RULES = {"sequential": rules.sequential, "most_neighbors": rules.most_neighbors}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train, on the same microbatches as the others of its part.

  Attributes:
    name: short, for files.
    label: for people.
    rule: a key of `RULES`.
    tau: the threshold; at 2 every micro-gradient is accepted: the plain mean.
    imitates: the arm of which this one is a control: it keeps as many
      micro-gradients in each step, drawn at random.
    part: the part that it is trained in, if not the one it is shown in.
  """

  name: str
  label: str
  rule: str = "sequential"
  tau: float = 2.0
  imitates: "Arm | None" = None
  part: str | None = None

  @property
  def is_gaf(self) -> bool:
    return self.tau < 2 and self.imitates is None


PLAIN = Arm("plain", "plain mean")
SPARED = dataclasses.replace(PLAIN, label="plain mean, nothing wrong", part="clean")


def arms(part: str, taus: Sequence[float]) -> list[Arm]:
  """The arms of a part; a control comes after the arm it imitates."""
  found = [PLAIN]
  for rule in RULES:
    for tau in taus:
      name, label = f"{rule}-{tau:g}", f"{rule} tau {tau:g}"
      gaf = Arm(name, f"GAF {label}", rule, tau)
      found.append(gaf)
      found.append(
        Arm(f"{name}-choice", f"random choice, as much as {label}", imitates=gaf)
      )
  return found if part == "clean" else [*found, SPARED]


def random_choice(accepted: np.ndarray, seed: int) -> np.ndarray:
  """As many micro-gradients in each step as GAF accepted, drawn at random.

  Args:
    accepted: bool `[steps, k]`, what GAF accepted.
    seed: of the run that is imitated.
  """
  drawn = np.random.default_rng((seed, *b"choice")).random(accepted.shape)
  return np.take_along_axis(accepted, np.argsort(drawn, axis=1), axis=1)

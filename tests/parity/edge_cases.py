"""Prints results of the two PyTorch implementations at the edges of README's table.

Run by hand, in the environment that `make_cases.py` describes:

    /tmp/parity/bin/python tests/parity/edge_cases.py

`authors` is `gradient-agreement-filtering` 0.1.3, `samples` is
`GAF-microbatch-pytorch` 0.0.5. Tau is 0.97.
"""

import gradient_agreement_filtering as authors
import torch
from GAF_microbatch_pytorch import GAF as samples

TAU = 0.97


class Linear(torch.nn.Module):
  """A model whose gradient is its input."""

  def __init__(self, dtype):
    super().__init__()
    self.weight = torch.nn.Parameter(torch.ones(2, dtype=dtype))

  def forward(self, rows):
    return (rows @ self.weight).unsqueeze(1)


def authors_distance(rows):
  """Distance of two rows, and whether they are accepted."""
  mean, distance = authors._filter_gradients_cosine_sim([rows[0]], [rows[1]], TAU)
  return f"distance {distance:.4g}, {'rejected' if mean is None else 'accepted'}"


def authors_step(rows):
  """The weights after one `step_GAF` from ones, with a learning rate of 1."""
  model = Linear(rows.dtype)
  data = torch.utils.data.TensorDataset(rows, torch.zeros(len(rows), dtype=torch.long))
  try:
    found = authors.step_GAF(
      model,
      torch.optim.SGD(model.parameters(), lr=1.0),
      lambda output, label: output.sum(),
      [torch.utils.data.Subset(data, [i]) for i in range(len(rows))],
      wandb=False,
      verbose=False,
      cos_distance_thresh=TAU,
    )
  except UnboundLocalError as error:
    return f"UnboundLocalError: {error}"
  return f"weights {model.weight.tolist()}, agreed_count {found['agreed_count']}"


def samples_kept(rows):
  """Distance of the first two rows, and the kept rows."""
  kept = samples.filter_gradients_by_agreement(rows.clone(), TAU)
  text = f"kept {(kept != 0).any(dim=1).tolist()}"
  if len(rows) > 1:
    text = f"distance {samples.cosine_sim_distance(rows)[0, 1].item():.4g}, {text}"
  return text


def main():
  direction = torch.tensor([0.6, 0.8])
  nan = torch.tensor([[1.0, 2.0], [float("nan"), 2.0], [1.0, 2.0]])
  print(f"torch {torch.__version__}")
  for norm in (5e-9, 5e-10):
    rows = torch.stack([direction * norm] * 2)
    print(f"identical, norm {norm:g}:")
    print(f"  authors: {authors_distance(rows)}")
    print(f"  samples: {samples_kept(rows)}")
  rows = torch.full((2, 1000), 1e19)
  print("identical, 1,000 elements of 1e19:")
  print(f"  authors: {authors_distance(rows)}\n  samples: {samples_kept(rows)}")
  print("second of three microbatches with NaN:")
  print(f"  authors: {authors_step(nan)}\n  samples: {samples_kept(nan)}")
  zeros = torch.zeros(2, 2, dtype=torch.float16)
  print("float16 zeros:")
  print(f"  authors: {authors_step(zeros)}\n  samples: {samples_kept(zeros)}")
  one = torch.tensor([[1.0, 2.0]])
  net = torch.nn.Linear(2, 1)
  samples.GAFWrapper(net)(one).sum().backward()
  print("one microbatch:")
  print(f"  authors: {authors_step(one)}")
  print(f"  samples: {samples_kept(one)}, GAFWrapper's gradient {net.weight.grad}")
  rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
  equal = authors._filter_gradients_cosine_sim([rows[0]], [rows[1]], 1.0)[0]
  kept = samples.filter_gradients_by_agreement(rows.clone(), 1.0)
  print("distance equal to tau, 1:")
  print(f"  authors: {'rejected' if equal is None else 'accepted'}")
  print(f"  samples: kept {(kept != 0).any(dim=1).tolist()}")


if __name__ == "__main__":
  main()

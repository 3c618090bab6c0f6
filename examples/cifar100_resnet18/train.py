"""Train: plain averaging, GAF and its random controls on the same microbatches.

`python train.py` without options runs the main job on scikit-learn's digits;
README.md beside this file says what else it does.
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import charts
import data
import options as options_lib
import report
import runs
from common import command, devices, launch


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code.

  It is 0, or 2 after a sentence about what is wrong, or 128 plus the number of the
  signal that stopped it, or 1 or 3 when one of several processes has died.
  """
  argv = sys.argv[1:] if argv is None else argv
  options = options_lib.parse(argv)
  parts = options_lib.parts(options)

  def start(received):
    if (options.processes or 1) > 1 and options.process_id is None:
      if options.download:  # Once, not in each process.
        for part in parts:
          data.load(part.dataset, options.data_dir, download=True)
      return launch.launch(__file__, argv, options, received)
    launch.watch()
    name = options_lib.run_name(options)
    with devices.leaving_at_once(options):
      return runs.run("train.py", options, parts, name, received, _finish)

  return command.guarded("train.py", start)


def _finish(directory, experiments):
  rows = directory.metrics()
  text = report.write(directory.path, experiments, rows)
  for one in experiments:
    charts.draw_part(directory.path, one, rows)
  return text


if __name__ == "__main__":
  sys.exit(main())

"""How fast the operations are, compared with their peers; docs/benchmarks.md explains the method.

Each file here is a command, `python -m benchmarks.NAME`:

run.py            providers of an operation against each other     ops/        the operations
stages.py         a training step, stage by stage                  harness/    how they are timed
largest_batch.py  the batch that fits a budget of memory           results/    committed rows
rows_read.py      the rows that a search through codes reads
serve_load.py     requests per second of `fastrag serve`
profile.py        where the time of an operation goes              profiling/  its parts
plot.py           figures and tables of committed results
gate.py           counts, compared with committed counts
gpu_suite.py      all of it on a machine with a GPU                gpu/        its parts
tune.py           the fastest of the kernels' candidates

`pytest benchmarks --benchmark-only -q` runs the same providers at one small shape (test_speed.py).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

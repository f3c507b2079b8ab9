"""How fast the operations are, and against whom; docs/benchmarks.md says what is measured how.

Each file here is a command, `python -m benchmarks.NAME`:

run.py            providers of an operation against each other     ops/        what is timed
stages.py         a training step, stage by stage                  harness/    how it is timed
largest_batch.py  what fits a budget of memory                     results/    what came of it
rows_read.py      what a search through codes reads
profile.py        where the time of an operation goes              profiling/  its parts
plot.py           figures and tables of committed results
gate.py           what can be counted, beside committed counts
gpu_suite.py      all of it on a machine with a GPU                gpu/        its parts
tune.py           the fastest of the kernels' candidates

`pytest benchmarks --benchmark-only -q` is the registry's other face (test_speed.py).
"""

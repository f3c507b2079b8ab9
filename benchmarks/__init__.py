"""How fast the operations are, and against whom: a registry, its runner and its pytest face.

python -m benchmarks.run --op marginal_loss      docs/benchmarks.md says what the columns mean
pytest benchmarks --benchmark-only -q

registry.py  what an entry is          ops/       the entries, one operation a module
run.py       the command               worker.py  the process that one provider is timed in
turns.py     workers taking turns      measure.py clock, memory, and what machine this is
report.py    tables and CSV            commits.py the same providers at two commits
"""

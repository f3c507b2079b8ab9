"""How the commands time an operation.

registry.py  types of an entry                  timing.py     providers taking turns
process.py   the child that a provider runs in  shared.py     tensors of all children
measure.py   clock, memory, machine             arguments.py  options that commands share
report.py    tables of a run                    rows.py       rows of CSV
plan.py      points within a budget             committed.py  rows in the repository
commits.py   the same at two commits            native.py     C++ programs of csrc/
"""

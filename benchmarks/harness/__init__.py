"""How the commands time an operation.

registry.py  types of an entry                  timing.py     providers taking turns
process.py   the child that a provider runs in  shared.py     tensors of all children
measure.py   clock, memory, machine             arguments.py  options that commands share
results.py   rows of CSV, tables of a run       committed.py  rows in the repository
commits.py   the same at two commits            native.py     C++ programs of csrc/
"""

"""What the commands time with.

registry.py  what an entry is               worker.py     the process that a provider is timed in
turns.py     workers taking turns           measure.py    clock, memory, and what machine this is
report.py    tables and CSV                 committed.py  rows of CSV that are in the repository
plan.py      points within a budget         commits.py    the same providers at two commits
shared.py    tensors of all processes       arguments.py  what the commands' options share
steps.py     training steps in processes    native.py     C++ programs of the sources in csrc/
"""

"""What benchmarks.gpu_suite and benchmarks.tune are made of.

isolation.py  many small pieces of work, in as few processes as survive them
watch.py      the pytest plugin and the recorder that tell it how far a process came
cases.py      every kernel at a small shape, for compute-sanitizer
steps.py      what one step runs    plan.py  which steps fit the time
sanitizer.py  compute-sanitizer: its command, and of which case it says what
toolkit.py    where the programs of the CUDA toolkit are
summary.py    what is written down
tuning.py     kernels in their regimes, each with an oracle
"""

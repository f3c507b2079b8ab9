"""The parts of benchmarks.gpu_suite and benchmarks.tune.

isolation.py  many small pieces of work, in as few processes as survive them
tests.py      the tests for a GPU      cases.py      every kernel, for compute-sanitizer
steps.py      the steps of the suite   sanitizer.py  the output of compute-sanitizer
summary.py    the files of the suite   tuning.py     kernels in their regimes, each with an oracle
"""

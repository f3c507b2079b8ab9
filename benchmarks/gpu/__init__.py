"""The parts of benchmarks.gpu_suite and benchmarks.tune.

isolation.py  many small pieces of work, in as few processes as survive them
tests.py      the tests for a GPU      cases.py    every kernel, for compute-sanitizer
summary.py    the files of the suite
"""

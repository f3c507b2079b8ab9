"""Readers of corpora and questions, templates, processor, collator and the embedded data set."""

from fastrag.data.benchmarks import read_benchmark, read_benchmark_passages
from fastrag.data.collator import RagCollator
from fastrag.data.default import DefaultDataset, default_dataset
from fastrag.data.processor import Contexts, RagProcessor
from fastrag.data.readers import Passage, Question, read_passages, read_questions
from fastrag.data.templates import BoundTemplate, Template

__all__ = [
    "BoundTemplate",
    "Contexts",
    "DefaultDataset",
    "Passage",
    "Question",
    "RagCollator",
    "RagProcessor",
    "Template",
    "default_dataset",
    "read_benchmark",
    "read_benchmark_passages",
    "read_passages",
    "read_questions",
]

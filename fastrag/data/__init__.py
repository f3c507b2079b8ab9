"""Data: corpus and question readers, templates, the collator, the embedded default set."""

from fastrag.data.collator import RagCollator
from fastrag.data.default import DefaultDataset, default_dataset
from fastrag.data.readers import Passage, Question, read_passages, read_questions
from fastrag.data.templates import BoundTemplate, Template

__all__ = [
    "BoundTemplate",
    "DefaultDataset",
    "Passage",
    "Question",
    "RagCollator",
    "Template",
    "default_dataset",
    "read_passages",
    "read_questions",
]

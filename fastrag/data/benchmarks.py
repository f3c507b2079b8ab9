"""Readers of the data sets that open-domain question answering is evaluated on, as published.

| Form        | Questions                                    | Passages                        |
|-------------|----------------------------------------------|---------------------------------|
| `nq`        | NQ-open, `NQ-open.dev.jsonl`                 |                                 |
| `triviaqa`  | TriviaQA, `unfiltered-web-dev.json`          |                                 |
| `popqa`     | PopQA, `test.tsv`                            |                                 |
| `hotpotqa`  | HotpotQA, `hotpot_dev_distractor_v1.json`    | paragraphs in the file          |
| `2wiki`     | 2WikiMultihopQA, `dev.json`                  | paragraphs in the file          |
| `musique`   | MuSiQue, `musique_ans_v1.0_dev.jsonl`        | paragraphs in the file          |
| `bamboogle` | Bamboogle, a table of `Question`, `Answer`   |                                 |
| `kilt`      | KILT, `nq-dev-kilt.jsonl`                    | `kilt_knowledgesource.json`     |
| `dpr`       | DPR's training files and retrieval results   | contexts in the file            |
| `beir`      | a BEIR folder, or one of its qrels files     | `corpus.jsonl` of the folder    |

A source is a path, which may end in `.gz` or `.xz`, or a Hugging Face `datasets` object with the
same fields. A file of JSON may be one list, one object a line, or (TriviaQA) an object that holds
the list. DPR's tables `psgs_w100.tsv` and `nq-test.csv` are read by `read_passages` and
`read_questions`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrag.data.json_lists import json_records
from fastrag.data.readers import Passage, Question
from fastrag.data.records import (
    as_text,
    as_texts,
    check_unique,
    jsonl_records,
    required_text,
    source_records,
    table_records,
)
from fastrag.messages import clipped, shown

Reader = Callable[[Mapping[str, Any], str, str], Question]
Paragraph = tuple[str, str, str]  # id, title, text
_TABLES = (".csv", ".tsv")
_LONGEST_SPAN = 10_000  # paragraphs; no page of Wikipedia has as many
_QRELS = ("query-id", "corpus-id", "score")


def read_benchmark(form: str, source: Any) -> Iterator[Question]:
    """Yield the questions of a published data set, with all accepted answers.

    Where the form names passages that hold the answer, they are the `positive_ids`: ids of the
    passages that `read_benchmark_passages` yields.

    Args:
        form: a name of `fastrag.data.benchmarks.QUESTIONS`, for example "hotpotqa".
        source: the file, the folder (BEIR), or a `datasets` object.

    Yields:
        Questions in file order.

    Raises:
        ValueError: no form of this name, a file that cannot be read, or a field that is missing or
            of another type. The message names file, line and field.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"question": "who has gods?", "answer": ["Greece", "Rome"]}')
        ...     file.flush()
        ...     next(read_benchmark("nq", file.name)).answers
        ('Greece', 'Rome')
    """
    if form not in QUESTIONS:
        raise ValueError(f"form: expected one of {list(QUESTIONS)}, got {shown(form)}")
    seen: dict[str, str] = {}
    for where, question in QUESTIONS[form](source):
        yield check_unique(question, where, seen)


def read_benchmark_passages(form: str, source: Any) -> Iterator[Passage]:
    """Yield the passages of a published data set, each once.

    A document without text has its title as text; one with neither is left out. Of several texts
    with the same id the first is kept. Both are counted in a warning at the end.

    Args:
        form: a name of `fastrag.data.benchmarks.PASSAGES`.
        source: the file, the folder (BEIR), or a `datasets` object.

    Yields:
        Passages in file order.

    Raises:
        ValueError: as `read_benchmark`.

    Example:
        >>> list(read_benchmark_passages("beir", "scifact"))               # doctest: +SKIP
    """
    if form not in PASSAGES:
        raise ValueError(f"form: expected one of {list(PASSAGES)}, got {shown(form)}")
    texts: dict[str, int] = {}
    n_empty = n_other = 0
    for id, title, text in PASSAGES[form](source):
        if not text.strip():
            title, text = "", title
        if not text.strip():
            n_empty += 1
        elif id not in texts:
            texts[id] = hash(text)
            yield Passage(id, title, text)
        elif texts[id] != hash(text):
            n_other += 1
    if n_empty:
        warnings.warn(f"{form}: left out {n_empty} passages without title and text", stacklevel=2)
    if n_other:
        warnings.warn(
            f"{form}: left out {n_other} texts under an id that another text has", stacklevel=2
        )


# ---- sources -----------------------------------------------------------------------------------


def _each(
    source: Any, columns: Sequence[str], root: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each record with its place: rows of a table or data set, or objects of a JSON file."""
    if not isinstance(source, str | os.PathLike):
        records = source_records(source, None, ())
    else:
        path = Path(source)
        stem = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
        if stem.suffix.lower() in _TABLES:
            records = source_records(source, None, columns)
        else:
            records = json_records(path, root)
    for where, record in records:
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected a record, got {type(record).__name__}")
        yield where, record


def _by_record(
    read: Reader, columns: Sequence[str], root: str | None, source: Any
) -> Iterator[tuple[str, Question]]:
    for row, (where, record) in enumerate(_each(source, columns, root)):
        yield where, read(record, where, str(row))


# ---- fields ------------------------------------------------------------------------------------


def _name(record: Mapping[str, Any], *names: str) -> str:
    """Return the first of several spellings of a field that a record has, else the first."""
    return next((name for name in names if name in record), names[0])


def _id(record: Mapping[str, Any], where: str, *names: str) -> str:
    """Return an id, which may be an integer."""
    name = _name(record, *names)
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return as_text(value, "id", where)
    return required_text(record, name, where)


def _listed(value: Any, key: str, where: str) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: {key}: expected a list, got {type(value).__name__}")
    return value


def _objects(value: Any, key: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a list with their places; None is an empty list."""
    for i, each in enumerate(_listed(() if value is None else value, key, where)):
        place = f"{where}: {key}[{i}]"
        if not isinstance(each, Mapping):
            raise ValueError(f"{place}: expected an object, got {type(each).__name__}")
        yield place, each


def _answer(record: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return the one answer of a record; the test sets of most forms have none."""
    return (as_text(record[key], key, where),) if record.get(key) is not None else ()


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _meta(record: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """Return the plain values among the other fields."""
    plain = (str, int, float, bool)
    return {k: v for k, v in record.items() if k not in used and isinstance(v, plain)}


def _paragraph_id(title: str, text: str) -> str:
    """Name a paragraph by its content, where the form has no id that is unique in the file."""
    return f"{title}#{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


# ---- forms -------------------------------------------------------------------------------------


def _nq(record: Mapping[str, Any], where: str, row: str) -> Question:
    key = _name(record, "answer", "answers")
    return Question(
        id=_id(record, where, "id") if "id" in record else row,
        question=required_text(record, "question", where),
        answers=as_texts(record.get(key), key, where),
        meta=_meta(record, "id", "question", key),
    )


def _triviaqa(record: Mapping[str, Any], where: str, row: str) -> Question:
    question, id = _name(record, "Question", "question"), _name(record, "QuestionId", "question_id")
    key = _name(record, "Answer", "answer")
    answer = record.get(key)
    answers: tuple[str, ...] = ()
    if answer is not None:  # the test set has none
        if not isinstance(answer, Mapping):
            raise ValueError(f"{where}: {key}: expected an object, got {type(answer).__name__}")
        place = f"{where}: {key}"
        more: list[str] = []
        for name in (_name(answer, "Aliases", "aliases"), "HumanAnswers"):
            more += as_texts(answer.get(name), name, place)
        answers = _distinct([required_text(answer, _name(answer, "Value", "value"), place), *more])
    return Question(
        id=_id(record, where, id),
        question=required_text(record, question, where),
        answers=answers,
        meta=_meta(record, question, id),
    )


def _popqa(record: Mapping[str, Any], where: str, row: str) -> Question:
    return Question(
        id=_id(record, where, "id"),
        question=required_text(record, "question", where),
        answers=as_texts(record.get("possible_answers"), "possible_answers", where),
        meta=_meta(record, "id", "question", "possible_answers"),
    )


def _hotpotqa(
    record: Mapping[str, Any],
    where: str,
    row: str,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> Question:
    answers = _answer(record, "answer", where)
    if aliases:
        answers = _distinct([*answers, *aliases.get(str(record.get("answer_id")), ())])
    return Question(
        id=_id(record, where, "_id", "id"),
        question=required_text(record, "question", where),
        answers=answers,
        positive_ids=_distinct(title for title, _ in _pairs(record, "supporting_facts", where)),
        meta=_meta(record, "_id", "id", "question", "answer"),
    )


def _pairs(record: Mapping[str, Any], key: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield [title, value] of a list, or of an object of two lists as `datasets` has it."""
    value = record.get(key)
    if isinstance(value, Mapping):
        columns = (_listed(each, f"{key}.{name}", where) for name, each in value.items())
        value = list(zip(*columns, strict=False))
    for i, pair in enumerate(_listed(() if value is None else value, key, where)):
        place = f"{where}: {key}[{i}]"
        if len(_listed(pair, key, where)) != 2:
            raise ValueError(f"{place}: expected [title, ...] of two, got {shown(pair)}")
        yield as_text(pair[0], "title", place), pair[1]


def _2wiki_questions(source: Any) -> Iterator[tuple[str, Question]]:
    """Yield the questions with the aliases of `id_aliases.json` in the same folder, if it is there.

    The official evaluation accepts aliases and demonyms of the entity `answer_id`.
    """
    aliases: dict[str, tuple[str, ...]] = {}
    known = Path(source).with_name("id_aliases.json") if isinstance(source, str | Path) else None
    if known is not None and known.is_file():
        for where, record in jsonl_records(known):
            names = (as_texts(record.get(key), key, where) for key in ("aliases", "demonyms"))
            aliases[_id(record, where, "Q_id")] = tuple(itertools.chain(*names))
    read = functools.partial(_hotpotqa, aliases=aliases)
    return _by_record(read, ("question",), None, source)


def _hotpotqa_passages(source: Any) -> Iterator[Paragraph]:
    """Yield the paragraphs of all contexts; Wikipedia's titles are their ids."""
    for where, record in _each(source, ("question",)):
        for title, sentences in _pairs(record, "context", where):
            place = f"{where}: context: {shown(title)}"
            sentences = [str(each) for each in _listed(sentences, "sentences", place)]
            yield title, title, " ".join(" ".join(sentences).split())


def _musique(record: Mapping[str, Any], where: str, row: str) -> Question:
    id, answers = _id(record, where, "id"), _answer(record, "answer", where)
    answerable = record.get("answerable") is not False
    gold = [
        _paragraph_id(title, text)
        for title, text, supporting in _musique_paragraphs(record, where)
        if supporting
    ]
    aliases = as_texts(record.get("answer_aliases"), "answer_aliases", where)
    return Question(
        # musique_full has each question twice, once with paragraphs that do not answer it
        id=id if answerable else f"{id}#unanswerable",
        question=required_text(record, "question", where),
        answers=_distinct([*answers, *aliases]) if answerable else (),
        positive_ids=_distinct(gold) if answerable else (),
        meta=_meta(record, "id", "question", "answer"),
    )


def _musique_paragraphs(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, bool]]:
    for place, paragraph in _objects(record.get("paragraphs"), "paragraphs", where):
        title, text = (required_text(paragraph, key, place) for key in ("title", "paragraph_text"))
        yield title, text, bool(paragraph.get("is_supporting"))


def _musique_passages(source: Any) -> Iterator[Paragraph]:
    for where, record in _each(source, ("question",)):
        for title, text, _ in _musique_paragraphs(record, where):
            yield _paragraph_id(title, text), title, text


def _bamboogle(record: Mapping[str, Any], where: str, row: str) -> Question:
    answer = _name(record, "Answer", "answer")
    question = _name(record, "Question", "question")
    return Question(
        id=_id(record, where, "id") if "id" in record else row,
        question=required_text(record, question, where),
        answers=_answer(record, answer, where),
        meta=_meta(record, "id", question, answer),
    )


def _kilt(record: Mapping[str, Any], where: str, row: str) -> Question:
    answers: list[str] = []
    gold: list[str] = []
    for place, output in _objects(record.get("output"), "output", where):
        answers += _answer(output, "answer", place) if output.get("answer") else ()
        for at, span in _objects(output.get("provenance"), "provenance", place):
            page = _id(span, at, "wikipedia_id")
            first, last = span.get("start_paragraph_id"), span.get("end_paragraph_id")
            if not isinstance(first, int) or first < 0:
                continue  # a page, not a paragraph of it
            last = last if isinstance(last, int) else first
            if last - first > _LONGEST_SPAN:
                raise ValueError(
                    f"{at}: end_paragraph_id: expected at most {_LONGEST_SPAN} after {first}, got "
                    f"{shown(last)}"
                )
            gold += [f"{page}:{paragraph}" for paragraph in range(first, last + 1)]
    return Question(
        id=_id(record, where, "id"),
        question=required_text(record, "input", where),
        answers=_distinct(answers),
        positive_ids=_distinct(gold),
        meta=_meta(record, "id", "input"),
    )


def _kilt_passages(source: Any) -> Iterator[Paragraph]:
    """Yield the paragraphs of the knowledge source, with the ids `page:paragraph`."""
    for where, record in _each(source, ("wikipedia_id",)):
        page = _id(record, where, "wikipedia_id")
        title = required_text(record, "wikipedia_title", where)
        paragraphs = record.get("text")
        if isinstance(paragraphs, Mapping):  # as `datasets` has it
            paragraphs = paragraphs.get("paragraph")
        for i, text in enumerate(_listed(paragraphs, "text", where)):
            if not isinstance(text, str):
                raise ValueError(f"{where}: text[{i}]: expected text, got {type(text).__name__}")
            if text.strip():
                yield f"{page}:{i}", title, text.strip()


def _dpr(record: Mapping[str, Any], where: str, row: str) -> Question:
    def ids(*keys: str) -> tuple[str, ...]:
        return _distinct(id for id, _, _ in _contexts(record, where, keys))

    return Question(
        id=row,
        question=required_text(record, "question", where),
        answers=as_texts(record.get("answers"), "answers", where),
        positive_ids=ids("positive_ctxs"),
        negative_ids=ids("hard_negative_ctxs", "negative_ctxs"),
        meta=_meta(record, "question"),
    )


def _contexts(record: Mapping[str, Any], where: str, keys: Sequence[str]) -> Iterator[Paragraph]:
    """Yield the contexts of some lists; NQ has `passage_id`, TriviaQA `psg_id`, results `id`."""
    for key in keys:
        for place, context in _objects(record.get(key), key, where):
            title, text = context.get("title") or "", required_text(context, "text", place)
            name = _name(context, "passage_id", "psg_id", "id")
            id = _id(context, place, name) if name in context else _paragraph_id(title, text)
            yield id, as_text(title, "title", place) if title else "", text


def _dpr_passages(source: Any) -> Iterator[Paragraph]:
    keys = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs", "ctxs")
    for where, record in _each(source, ("question",)):
        yield from _contexts(record, where, keys)


# ---- BEIR folders ------------------------------------------------------------------------------


def _beir_questions(source: Any) -> Iterator[tuple[str, Question]]:
    """Yield the queries that the qrels judge; a score above 0 is the grade of a right passage."""
    folder, qrels = _beir_paths(source)
    grades: dict[str, dict[str, int]] = {}
    places: dict[str, str] = {}
    for where, record in table_records(qrels, "\t", _QRELS):
        query, passage = (required_text(record, key, where) for key in _QRELS[:2])
        try:
            grade = int(record["score"])
        except ValueError:
            raise ValueError(
                f"{where}: score: expected an integer, got {shown(record['score'])}"
            ) from None
        if grades.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise ValueError(f"{where}: score: expected one of {shown(passage)}, got two")
        places.setdefault(query, where)
    for where, record in jsonl_records(_part(folder, "queries.jsonl")):
        id = _id(record, where, "_id")
        if id not in grades:
            continue  # of another split
        judged = grades.pop(id)
        right = {passage: grade for passage, grade in judged.items() if grade > 0}
        yield (
            where,
            Question(
                id=id,
                question=required_text(record, "text", where),
                positive_ids=tuple(right),
                negative_ids=tuple(passage for passage in judged if passage not in right),
                relevance=tuple(right.values()) if set(right.values()) - {1} else (),
                meta=_meta(record, "_id", "text"),
            ),
        )
    if grades:
        missing = next(iter(grades))
        raise ValueError(
            f"{places[missing]}: query-id: expected a query of queries.jsonl, got {shown(missing)}"
        )


def _beir_passages(source: Any) -> Iterator[Paragraph]:
    for where, record in jsonl_records(_part(_beir_paths(source)[0], "corpus.jsonl")):
        title, text = record.get("title") or "", record.get("text") or ""
        for key, value in (("title", title), ("text", text)):
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key}: expected text, got {type(value).__name__}")
        yield _id(record, where, "_id"), title, text


def _beir_paths(source: Any) -> tuple[Path, Path]:
    """Return the folder and the qrels file: `qrels.tsv`, `qrels/test.tsv`, or the one given."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source: expected a folder, got {type(source).__name__}")
    path = Path(source)
    if path.is_file():
        return path.parent.parent if path.parent.name == "qrels" else path.parent, path
    whole = path / "qrels.tsv"
    return path, whole if whole.is_file() else path / "qrels" / "test.tsv"


def _part(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{clipped(folder)}: expected a folder with {name}, got none")


def _records_of(
    read: Reader, columns: Sequence[str] = ("question",), root: str | None = None
) -> Callable[[Any], Iterator[tuple[str, Question]]]:
    return functools.partial(_by_record, read, columns, root)


QUESTIONS: dict[str, Callable[[Any], Iterator[tuple[str, Question]]]] = {
    "nq": _records_of(_nq),
    "triviaqa": _records_of(_triviaqa, root="Data"),
    "popqa": _records_of(_popqa),
    "hotpotqa": _records_of(_hotpotqa),
    "2wiki": _2wiki_questions,
    "musique": _records_of(_musique),
    "bamboogle": _records_of(_bamboogle, ("Question",)),
    "kilt": _records_of(_kilt, ("input",)),
    "dpr": _records_of(_dpr),
    "beir": _beir_questions,
}
PASSAGES: dict[str, Callable[[Any], Iterator[Paragraph]]] = {
    "hotpotqa": _hotpotqa_passages,
    "2wiki": _hotpotqa_passages,
    "musique": _musique_passages,
    "kilt": _kilt_passages,
    "dpr": _dpr_passages,
    "beir": _beir_passages,
}

"""Published data sets, in files of a few records written as their authors write them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastrag.data import Passage, Question, json_lists
from fastrag.data.benchmarks import PASSAGES, QUESTIONS, read_benchmark, read_benchmark_passages
from fastrag.data.default import load_passages, load_questions
from fastrag.data.json_lists import json_records

HOTPOT = {
    "_id": "5a8b57f25542995d1e6f1371",
    "answer": "yes",
    "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
    "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0], ["Ed Wood", 1]],
    "context": [
        ["Ed Wood (film)", ["Ed Wood is a 1994 film.", " It was made by Tim Burton."]],
        ["Scott Derrickson", ["Scott Derrickson is an American director."]],
        ["Ed Wood", ["Edward Davis Wood Jr. was an American.", " He made films."]],
    ],
    "type": "comparison",
    "level": "hard",
}
TRIVIA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Sunset Blvd", "Sunset Boulevard"],
                "HumanAnswers": ["Sunset Boulevard", "Sunset Bvd"],
                "NormalizedAliases": ["sunset blvd", "sunset boulevard"],
                "Type": "WikipediaEntity",
                "Value": "Sunset Boulevard",
            },
            "EntityPages": [{"Title": "Andrew Lloyd Webber", "Filename": "A.txt"}],
            "Question": "Which Lloyd Webber musical premiered in the US on 10th December 1993?",
            "QuestionId": "tc_33",
            "QuestionSource": "http://www.triviacountry.com/",
            "SearchResults": [{"Description": "The [official] site", "Rank": 0}],
        },
        {"Question": "Without an answer?", "QuestionId": "tc_34"},
    ],
    "Domain": "Web",
    "VerifiedEval": False,
    "Version": 1.0,
}
MUSIQUE = {
    "id": "2hop__13548_13529",
    "paragraphs": [
        {"idx": 0, "title": "Pakistan", "paragraph_text": "A country.", "is_supporting": False},
        {"idx": 1, "title": "Newcastle", "paragraph_text": "Green sold it.", "is_supporting": True},
        {"idx": 2, "title": "Newcastle", "paragraph_text": "A city.", "is_supporting": True},
    ],
    "question": "When was the person who wrote it born?",
    "question_decomposition": [{"id": 13548, "question": "a?", "answer": "b"}],
    "answer": "1981",
    "answer_aliases": ["in 1981"],
    "answerable": True,
}
KILT = {
    "id": "-4469503464110108160",
    "input": "who wrote the battle hymn?",
    "output": [
        {
            "answer": "Julia Ward Howe",
            "provenance": [
                {
                    "wikipedia_id": "70021",
                    "title": "Battle Hymn of the Republic",
                    "start_paragraph_id": 1,
                    "end_paragraph_id": 2,
                }
            ],
        },
        {"answer": "Howe", "provenance": [{"wikipedia_id": "9", "title": "Howe"}]},
        {"provenance": [{"wikipedia_id": 70021, "start_paragraph_id": 1, "end_paragraph_id": 1}]},
    ],
    "meta": {},
}
PAGE = {
    "_id": "70021",
    "wikipedia_id": "70021",
    "wikipedia_title": "Battle Hymn",
    "text": ["Battle Hymn\n", "The hymn is a song.\n", "  ", "Julia Ward Howe wrote it."],
    "anchors": [],
}
DPR = [
    {
        "dataset": "nq_dev_psgs_w100",
        "question": "who sings it",
        "answers": ["Ada", "Bob"],
        "positive_ctxs": [
            {"title": "Song", "text": "Ada sings.", "score": 1000, "passage_id": "11828866"}
        ],
        "negative_ctxs": [{"title": "", "text": "No song.", "passage_id": 5}],
        "hard_negative_ctxs": [{"title": "Tune", "text": "A tune.", "psg_id": "13"}],
    },
    {"question": "bare", "answers": ["x"], "positive_ctxs": [{"title": "T", "text": "Text."}]},
]


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_nq_open(tmp_path: Path) -> None:
    path = write(
        tmp_path / "NQ-open.dev.jsonl",
        lines({"question": "when was it?", "answer": ["14 December 1972 UTC", "December 1972"]}),
    )
    assert list(read_benchmark("nq", path)) == [
        Question("0", "when was it?", ("14 December 1972 UTC", "December 1972"))
    ]


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
def test_triviaqa(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "unfiltered-web-dev.json", json.dumps(TRIVIA, indent=indent))
    first, second = read_benchmark("triviaqa", path)
    assert first.id == "tc_33" and first.question.startswith("Which Lloyd Webber")
    assert first.answers == ("Sunset Boulevard", "Sunset Blvd", "Sunset Bvd")
    assert first.meta == {"QuestionSource": "http://www.triviacountry.com/"}
    assert second == Question("tc_34", "Without an answer?")


def test_triviaqa_from_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    record = {
        "question": "q?",
        "question_id": "tc_1",
        "question_source": "s",
        "answer": {"aliases": ["B"], "normalized_aliases": ["b"], "value": "A"},
    }
    [question] = read_benchmark("triviaqa", datasets.Dataset.from_list([record]))
    assert question == Question("tc_1", "q?", ("A", "B"))


def test_popqa(tmp_path: Path) -> None:
    header = ["id", "subj", "prop", "obj", "s_pop", "question", "possible_answers"]
    answers = '"[""politician"", ""political leader""]"'
    row = ["4222362", "George Rankin", "occupation", "politician", "142", "What is it?", answers]
    path = write(tmp_path / "test.tsv", "\t".join(header) + "\n" + "\t".join(row) + "\n")
    [question] = read_benchmark("popqa", path)
    assert question == Question("4222362", "What is it?", ("politician", "political leader"))
    assert question.meta["prop"] == "occupation" and question.meta["s_pop"] == "142"


def test_hotpotqa(tmp_path: Path) -> None:
    path = write(tmp_path / "hotpot_dev_distractor_v1.json", json.dumps([HOTPOT]))
    [question] = read_benchmark("hotpotqa", path)
    assert question == Question(
        HOTPOT["_id"], HOTPOT["question"], ("yes",), ("Scott Derrickson", "Ed Wood")
    )
    assert question.meta == {"type": "comparison", "level": "hard"}
    passages = list(read_benchmark_passages("hotpotqa", path))
    assert passages[0] == Passage(
        "Ed Wood (film)", "Ed Wood (film)", "Ed Wood is a 1994 film. It was made by Tim Burton."
    )
    assert set(question.positive_ids) < {passage.id for passage in passages}


def test_hotpotqa_from_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    record = {
        "id": "a",
        "question": "q?",
        "answer": "yes",
        "supporting_facts": {"title": ["T", "U"], "sent_id": [0, 1]},
        "context": {"title": ["T", "U"], "sentences": [["One.", " Two."], ["Three."]]},
    }
    source = datasets.Dataset.from_list([record])
    assert list(read_benchmark("hotpotqa", source)) == [Question("a", "q?", ("yes",), ("T", "U"))]
    assert list(read_benchmark_passages("hotpotqa", source)) == [
        Passage("T", "T", "One. Two."),
        Passage("U", "U", "Three."),
    ]


def test_2wiki_with_the_aliases_of_its_folder(tmp_path: Path) -> None:
    record = HOTPOT | {"answer": "Poland", "answer_id": "Q36", "evidences": [["a", "b", "c"]]}
    path = write(tmp_path / "dev.json", json.dumps([record]))
    assert next(read_benchmark("2wiki", path)).answers == ("Poland",)
    write(
        tmp_path / "id_aliases.json",
        lines({"Q_id": "Q36", "aliases": ["Republic of Poland"], "demonyms": ["Polish"]}),
    )
    [question] = read_benchmark("2wiki", path)
    assert question.answers == ("Poland", "Republic of Poland", "Polish")
    assert question.positive_ids == ("Scott Derrickson", "Ed Wood")
    assert len(list(read_benchmark_passages("2wiki", path))) == 3


def test_musique(tmp_path: Path) -> None:
    """A title has several paragraphs, and musique_full has a question twice."""
    twin = MUSIQUE | {"answerable": False}
    path = write(tmp_path / "musique_full_v1.0_dev.jsonl", lines(MUSIQUE, twin))
    first, second = read_benchmark("musique", path)
    assert first.id == "2hop__13548_13529" and first.answers == ("1981", "in 1981")
    passages = {passage.id: passage for passage in read_benchmark_passages("musique", path)}
    assert [passages[id].text for id in first.positive_ids] == ["Green sold it.", "A city."]
    assert len(passages) == 3 and {each.title for each in passages.values()} == {
        "Pakistan",
        "Newcastle",
    }
    assert second.id == "2hop__13548_13529#unanswerable"
    assert second.answers == second.positive_ids == ()


def test_bamboogle(tmp_path: Path) -> None:
    path = write(tmp_path / "Bamboogle.csv", 'Question,Answer\n"Who, then?",James Madison\n')
    assert list(read_benchmark("bamboogle", path)) == [
        Question("0", "Who, then?", ("James Madison",))
    ]


def test_kilt(tmp_path: Path) -> None:
    path = write(tmp_path / "nq-dev-kilt.jsonl", lines(KILT, {"id": "t", "input": "test?"}))
    first, second = read_benchmark("kilt", path)
    assert first.answers == ("Julia Ward Howe", "Howe")
    assert first.positive_ids == ("70021:1", "70021:2")  # a page without paragraphs names none
    assert second == Question("t", "test?")
    source = write(tmp_path / "kilt_knowledgesource.json", lines(PAGE))
    assert [(p.id, p.text) for p in read_benchmark_passages("kilt", source)] == [
        ("70021:0", "Battle Hymn"),
        ("70021:1", "The hymn is a song."),
        ("70021:3", "Julia Ward Howe wrote it."),
    ]


def test_dpr(tmp_path: Path) -> None:
    path = tmp_path / "biencoder-nq-dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps(DPR, indent=4).encode()))
    first, second = read_benchmark("dpr", path)
    assert first == Question("0", "who sings it", ("Ada", "Bob"), ("11828866",), ("13", "5"))
    assert first.meta == {"dataset": "nq_dev_psgs_w100"}
    passages = list(read_benchmark_passages("dpr", path))
    assert [p.id for p in passages] == ["11828866", "13", "5", *second.positive_ids]
    assert passages[2] == Passage("5", "", "No song.")
    results = [{"question": "q", "answers": ["a"], "ctxs": [{"id": "wiki:7", "text": "Seven."}]}]
    path = write(tmp_path / "results.json", json.dumps(results))
    assert list(read_benchmark_passages("dpr", path)) == [Passage("wiki:7", "", "Seven.")]


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "nfcorpus"
    corpus = [
        {"_id": "MED-10", "title": "Statins", "text": "Lower it.", "metadata": {"url": "u"}},
        {"_id": "MED-11", "title": "Only a title", "text": ""},
        {"_id": "MED-12", "title": "", "text": " "},
        {"_id": "MED-13", "text": "No title."},
    ]
    queries = [{"_id": f"PLAIN-{i}", "text": f"query {i}", "metadata": {}} for i in range(3)]
    write(folder / "corpus.jsonl", lines(*corpus))
    write(folder / "queries.jsonl", lines(*queries))
    header = "query-id\tcorpus-id\tscore\n"
    rows = "PLAIN-1\tMED-10\t2\nPLAIN-1\tMED-11\t1\nPLAIN-1\tMED-13\t0\nPLAIN-0\tMED-13\t1\n"
    write(folder / "qrels" / "test.tsv", header + rows)
    write(folder / "qrels" / "dev.tsv", header + "PLAIN-2\tMED-13\t1\n")
    return folder


def test_beir(beir: Path) -> None:
    first, second = read_benchmark("beir", beir)
    assert first == Question("PLAIN-0", "query 0", (), ("MED-13",))
    assert second == Question(
        "PLAIN-1", "query 1", (), ("MED-10", "MED-11"), ("MED-13",), relevance=(2, 1)
    )
    assert [q.id for q in read_benchmark("beir", beir / "qrels" / "dev.tsv")] == ["PLAIN-2"]
    with pytest.warns(UserWarning, match="beir: left out 1 passages without title and text"):
        passages = list(read_benchmark_passages("beir", beir))
    assert passages == [
        Passage("MED-10", "Statins", "Lower it."),
        Passage("MED-11", "", "Only a title"),
        Passage("MED-13", "", "No title."),
    ]
    (beir / "qrels" / "test.tsv").rename(beir / "qrels.tsv")
    assert list(read_benchmark("beir", beir)) == [first, second]


def test_a_second_text_under_an_id_is_counted(tmp_path: Path) -> None:
    other = HOTPOT | {"_id": "b", "context": [["Ed Wood", ["Another text."]], HOTPOT["context"][1]]}
    path = write(tmp_path / "hotpot.json", json.dumps([HOTPOT, other]))
    with pytest.warns(UserWarning, match="hotpotqa: left out 1 texts under an id that another"):
        passages = list(read_benchmark_passages("hotpotqa", path))
    assert len(passages) == 3 and passages[2].text.startswith("Edward Davis")


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("nq", {"answer": ["a"]}, r"question: expected text, got nothing next to \['answer'\]"),
        ("nq", {"question": "q", "answer": [1]}, "answer: expected text, got int"),
        ("triviaqa", {"QuestionId": "t", "Question": "q", "Answer": "a"}, "Answer: expected an ob"),
        ("triviaqa", {"QuestionId": "t", "Question": "q", "Answer": {}}, "Answer: Value: expected"),
        ("popqa", {"id": 1, "question": "q", "possible_answers": 3}, "possible_answers: expected"),
        ("hotpotqa", {"question": "q"}, "_id: expected text, got nothing"),
        ("hotpotqa", HOTPOT | {"answer": 5}, "answer: expected text, got int"),
        ("hotpotqa", HOTPOT | {"supporting_facts": ["T"]}, "supporting_facts: expected a list, go"),
        ("2wiki", HOTPOT | {"supporting_facts": [["T"]]}, r"supporting_facts\[0\]: expected \["),
        ("musique", MUSIQUE | {"paragraphs": [{}]}, r"paragraphs\[0\]: title: expected text, got"),
        ("bamboogle", {"Question": "q", "Answer": ["a"]}, "Answer: expected text, got list"),
        ("kilt", KILT | {"output": {}}, "output: expected a list, got dict"),
        ("kilt", KILT | {"output": [{"provenance": [{}]}]}, r"output\[0\]: provenance\[0\]: wiki"),
        ("dpr", {"question": "q", "positive_ctxs": [{}]}, r"positive_ctxs\[0\]: text: expected"),
        (
            "dpr",
            {"question": "q", "negative_ctxs": ["c"]},
            r"negative_ctxs\[0\]: expected an obj",
        ),
    ],
)
def test_errors_name_file_line_and_field(
    tmp_path: Path, form: str, record: dict[str, Any], message: str
) -> None:
    """In JSON lines, and in an indented list, which has the record on a line of its own too."""
    root = "Data" if form == "triviaqa" else None
    if root is None:
        path = write(tmp_path / "f.jsonl", "\n" + lines(record))
        with pytest.raises(ValueError, match=rf"f\.jsonl:2: {message}"):
            list(read_benchmark(form, path))
    listed = "[\n\n" + json.dumps(record, indent=1) + "]"
    path = write(tmp_path / "f.json", f'{{"Version": 1.5, "Data": {listed}}}' if root else listed)
    with pytest.raises(ValueError, match=rf"f\.json:3 \(record 0\): {message}"):
        list(read_benchmark(form, path))


def test_errors_of_files(tmp_path: Path, beir: Path) -> None:
    def fails(form: str, name: str, text: str, message: str) -> None:
        path = write(tmp_path / name, text)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{message}"):
            list(read_benchmark(form, path))

    fails("hotpotqa", "f.json", "[1]", r"1 .*expected a record, got int")
    fails("hotpotqa", "f.json", "", r"1: expected '\[', got the end of the file")
    fails("hotpotqa", "f.json", "[\n{}\n{}]", r"2 \(record 0\): _id: expected text")
    fails("hotpotqa", "f.json", f"[\n{json.dumps(HOTPOT)}\n;", r"3: expected ',', got ';'")
    fails("hotpotqa", "f.json", '[\n{"a": \n', r"2: expected JSON, got ")
    fails("hotpotqa", "f.json", '[{"a": 1, "a": 2}]', r"1: expected JSON, got the key 'a' twice")
    fails("hotpotqa", "f.json", json.dumps([HOTPOT] * 2), r"1 \(record 1\): expected unique ids")
    fails("triviaqa", "f.json", '{"Version": 1}', r"1: expected the key 'Data' with a list")
    fails("triviaqa", "f.json", '{"Data": {}}', r"1: expected '\[', got '{'")
    fails("bamboogle", "f.csv", "question,answer\na,b\n", r"1: expected a header with \['Quest")
    with pytest.raises(ValueError, match=r"form: expected one of \['nq', .*'beir'\], got 'squad'"):
        list(read_benchmark("squad", tmp_path))
    with pytest.raises(ValueError, match=r"form: expected one of \['hotpotqa', .*, got 'nq'"):
        list(read_benchmark_passages("nq", tmp_path))
    with pytest.raises(ValueError, match="source: expected a path or a datasets object, got int"):
        list(read_benchmark("nq", 5))
    with pytest.raises(ValueError, match="source: expected a folder, got int"):
        list(read_benchmark("beir", 5))
    qrels = beir / "qrels" / "test.tsv"
    header = "query-id\tcorpus-id\tscore\n"
    for rows, message in (
        ("PLAIN-1\tMED-10\tx\n", r"test\.tsv:2: score: expected an integer, got 'x'"),
        ("PLAIN-1\tMED-10\t1\nPLAIN-1\tMED-10\t2\n", r"test\.tsv:3: score: .* got two"),
        ("PLAIN-1\tM\t1\nNONE\tM\t1\n", r"test\.tsv:3: query-id: expected a query .*got 'NONE'"),
    ):
        qrels.write_text(header + rows)
        with pytest.raises(ValueError, match=message):
            list(read_benchmark("beir", beir))
    (beir / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"nfcorpus: expected a folder with queries.jsonl"):
        list(read_benchmark("beir", beir))


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    records = [{"text": 'a "[{\n', "n": [i, {"m": -1.5e3}]} for i in range(20)]
    path = write(tmp_path / "f.json", json.dumps(records, indent=indent))
    found = list(json_records(path))
    assert [record for _, record in found] == records
    text = path.read_text().splitlines()
    for where, _ in found:
        line = int(where.removeprefix(f"{path}:").partition(" ")[0])
        assert text[line - 1].strip().startswith(("{", "[{"))


def test_every_form_is_documented() -> None:
    from fastrag.data import benchmarks

    named = re.findall(r"^\| `(\w+)` .*\| *([^|]*)\|$", benchmarks.__doc__ or "", re.MULTILINE)
    assert [name for name, _ in named] == list(QUESTIONS)
    assert [name for name, passages in named if passages.strip()] == list(PASSAGES)


def test_a_form_and_a_path_name_questions_and_a_corpus(beir: Path) -> None:
    assert load_questions(f"beir:{beir}") == list(read_benchmark("beir", beir))
    with pytest.warns(UserWarning, match="without title and text"):
        assert len(list(load_passages(f"beir:{beir}"))) == 3

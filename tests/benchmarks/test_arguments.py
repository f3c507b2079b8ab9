"""A bad argument of any command is one line on stderr that names it, and exit code 2."""

from __future__ import annotations

from importlib import import_module

import pytest

SHAPE = "64,16,3,2"
CSV = "op,provider,mode"
CASES = [
    ("run", "", ["--op"]),
    ("run", "--op nope", ["'nope'", "marginal_loss, ", "doc_scores"]),
    ("run", "--op mips --providers cpp,ccp", ["'ccp'", "read, fma, cpp"]),
    ("run", "--op mips --providers=", ["''", "read, fma, cpp"]),
    ("run", "--op marginal_loss --marginal both", ["'both'", "token, sequence"]),
    ("run", "--op marginal_loss --shape 2,5,32", ["B,K,T,H,V", "'2,5,32'"]),
    ("run", "--op marginal_loss --shape 2,5,0,8,9", ["positive", "'2,5,0,8,9'"]),
    ("run", "--op mips --shape 99999999999,8,1,1", ["--shape", "at most", "'99999999999"]),
    ("run", "--op mips --shape 2000000000,99999,1,1", ["--shape", "GiB", "2000000000"]),
    ("run", "--op rag_step --shape 4,5,64,16,123,9", ["--shape: H:", "256", "got 123"]),
    ("run", "--op mips --dtype int8", ["float32", "'int8'"]),
    ("run", "--op mips --corpus words", ["--corpus", "'words'", "randn, embeddings"]),
    ("run", "--op mips --corpus embeddings --mode int8", ["no mode 'int8/embeddings'"]),
    ("run", "--op doc_scores --corpus randn", ["--corpus: doc_scores has one corpus"]),
    ("run", "--op mips --vectors gone.npy", ["--vectors: gone.npy: ", "No such file"]),
    ("run", "--op mips --vectors gone.npy --corpus randn", ["--vectors", "--corpus"]),
    ("run", "--op mips --device tpu", ["cpu, cuda", "'tpu'"]),
    ("run", "--op mips --rounds 0", ["at least 1", "got 0"]),
    ("run", "--op mips --csv /", ["--csv", "/: Is a directory"]),
    ("run", "--op mips --csv /nowhere/x.csv", ["--csv", "/nowhere/x.csv: No such file"]),
    ("run", f"--op mips --csv {__file__}", ["--csv", __file__, CSV]),
    ("run", "--op marginal_loss --curve N", ["'N'", "B, K, T, V"]),
    ("run", "--op doc_scores --curve K --shape 2,5,9,8", ["--curve", "--shape"]),
    ("run", "--op contexts --curve all", ["--curve", "contexts", "curves: none"]),
    ("run", "--op marginal_loss --base HEAD --providers hf", ["'hf'", "torch"]),
    ("run", "--op mips --base HEAD --max-regression nan", ["more than 0", "nan"]),
    ("run", "--op mips --max-regression 1.2", ["--max-regression", "--base"]),
    ("run", "--op mips --budget-minutes 0", ["--budget-minutes", "more than 0"]),
    ("run", "--op mips --budget-minutes 1 --base HEAD", ["--budget-minutes"]),
    ("run", "--op all --shape 2,5", ["--shape", "one op"]),
    ("run", "--op all --providers cpp", ["--providers", "one op"]),
    ("stages", "--providers faiss", ["no provider is called 'faiss'; known: fastrag, hf"]),
    ("stages", "--mode both", ["rag_step has no mode 'both'"]),
    ("stages", "--shape 1,2", ["--shape: expected B,K,L,T,H,N, got '1,2'"]),
    ("stages", f"--csv {__file__}", ["--csv", "stage"]),
    ("largest_batch", "--budget 4GB", ["--budget", "GiB", "'4GB'"]),
    ("largest_batch", "--budget 1000000GiB --device cpu", ["at most half of the free memory"]),
    ("rows_read", "--vectors a.npy", ["--vectors, --queries: expected both or neither"]),
    ("rows_read", "--k 0", ["--k: expected at least 1, got 0"]),
    ("rows_read", "--vectors gone.npy --queries gone.npy", ["gone.npy"]),
    ("gate", "--only clocks", ["'clocks'"]),
    ("tune", "--only group_min", ["'group_min'"]),
    ("tune", "--out /nowhere/tuned.json", ["--out", "/nowhere"]),
    ("gpu_suite", "--only test", ["no step is called 'test'"]),
    ("gpu_suite", "--budget-minutes 0", ["--budget-minutes: expected more than 0"]),
    ("gpu_suite", f"--out {__file__}", ["--out: expected a folder"]),
    ("profile", "--op mips --provider fais", ["'fais'", "faiss", "cpp"]),
    ("profile", "--op mips --mode token", ["'token'", "float32"]),
    ("profile", "--op mips --shape 1,2", ["N,D,k,B", "'1,2'"]),
    ("profile", "--op mips --device cuda", ["--device", "torch sees no CUDA device"]),
    ("profile", f"--op mips --loop --shape {SHAPE}", ["--loop", "CUDA"]),
    ("profile", "--op mips --kernel (", ["--kernel", "'('"]),
    ("profile", "--op mips --roofline --csv /nowhere.csv", ["--roofline", "/nowhere.csv"]),
    ("profile", f"--op mips --roofline --csv {__file__}", ["--roofline", "rows of mips"]),
    ("profile", "--op mips --csv rows.csv", ["--csv", "--roofline"]),
    ("profile", f"--op mips --out {__file__}/new", ["--out", "a folder"]),
    ("profile", "--op rag_step --shape 4,5,64,16,123,9", ["--shape: H:", "got 123"]),
    ("profile", "--op contexts --roofline", ["contexts only moves bytes"]),
    ("profile", "--op contexts --aot", ["contexts launches no kernel"]),
    ("profile", "--op marginal_loss --provider cce", ["cce", "cuda"]),
    ("profile", "--op mips --nsys --mode float32", ["--shape", "float32", "cuda"]),
    ("profile", "--op mips --ncu --sass", ["--ncu", "--sass"]),
]


@pytest.mark.parametrize(("command", "line", "named"), CASES, ids=[" ".join(c[:2]) for c in CASES])
def test_a_bad_argument_is_one_line(
    command: str,
    line: str,
    named: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == "rows_read":
        pytest.importorskip("fastrag._C", reason="the extension is not built")
    if command == "tune":
        pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        import_module(f"benchmarks.{command}").main(line.split())
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"benchmarks.{command}: ")
    for text in named:
        assert text in captured.err


def test_an_unknown_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRAG_BACKEND", "tourch")
    with pytest.raises(SystemExit):
        import_module("benchmarks.run").main(["--op", "marginal_loss"])
    assert "'tourch'; triton, cpp, torch" in capsys.readouterr().err

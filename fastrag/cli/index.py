"""`fastrag index`: build, verify and describe a passage index."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastrag.cli.options import add_device, device_of, positive
from fastrag.cli.output import quiet
from fastrag.messages import shown
from fastrag.terminal import labelled

_LABEL = 12  # columns of a name in `index info`
_FOLDER_HELP = "folder from `fastrag index build`, of a run, or of a saved index"


def add(commands: Any) -> None:
    """Add the commands to the parser's."""
    index = commands.add_parser("index", help="build, describe or verify a passage index")
    actions = index.add_subparsers(dest="action", required=True, metavar="action")
    build = actions.add_parser("build", help="tokenise and encode a corpus")
    build.add_argument(
        "--corpus",
        required=True,
        help="JSONL, CSV or TSV file, `default`, or a folder of a dataset's save_to_disk",
    )
    build.add_argument(
        "--encoder",
        "--passage-encoder",
        required=True,
        metavar="ENCODER",
        help="model folder or Hub id of the passage encoder",
    )
    build.add_argument("--generator", required=True, help="model folder or Hub id of the generator")
    build.add_argument("--out", required=True, help="folder to write")
    build.add_argument(
        "--template",
        type=_template,
        default="plain",
        help="plain, chat, or a YAML mapping of a template's fields, as in the config that will "
        "train on the index",
    )
    build.add_argument(
        "--max-passage", type=positive, metavar="TOKENS", help="cut longer passages (default 256)"
    )
    build.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="passages per batch (default 64)",
    )
    build.add_argument(
        "--dtype",
        type=_dtype,
        default="float32",
        help="how the index stores vectors: float32 (default), float16, bfloat16 or int8",
    )
    build.add_argument(
        "--vectors",
        nargs="+",
        metavar="FILE",
        help="vectors of the passages that others made, which are then not encoded: .npy, .pt or "
        ".safetensors files in the order of the corpus, a folder of a dataset's save_to_disk, or a "
        "file of faiss",
    )
    build.add_argument(
        "--column",
        metavar="NAME",
        help="with --vectors: column of the dataset, or tensor of the file (default embeddings)",
    )
    build.add_argument(
        "--block-size",
        type=positive,
        metavar="N",
        help="passages per block; an interrupted build continues after the last whole block "
        "(default 32768)",
    )
    add_device(build)
    build.set_defaults(run=_build)
    verify = actions.add_parser("verify", help="check every byte against its checksum")
    verify.add_argument("folder", help=_FOLDER_HELP)
    verify.set_defaults(run=_verify)
    described = actions.add_parser("info", help="describe an index and measure its recall")
    described.add_argument("folder", help=_FOLDER_HELP)
    described.add_argument(
        "--probe",
        type=positive,
        metavar="N",
        help="search for N of its vectors and report the recall against an exact search",
    )
    described.add_argument(
        "--k", type=positive, metavar="K", help="number of hits to compare (default 10)"
    )
    described.add_argument(
        "--exact",
        metavar="DIR",
        help="index of the original vectors to compare with; default: the vectors that the index "
        "reconstructs",
    )
    described.set_defaults(run=_info)


def _build(arguments: argparse.Namespace) -> int:
    quiet()
    from fastrag.data.processor import MAX_PASSAGE, RagProcessor
    from fastrag.index.passage_writer import BLOCK_ROWS
    from fastrag.index.vector_files import COLUMN, open_vectors
    from fastrag.train import indexing, pretrained

    if arguments.column and not arguments.vectors:
        raise ValueError(f"--column: expected --vectors with it, got {shown(arguments.column)}")
    vectors = None
    if arguments.vectors:
        vectors = open_vectors(arguments.vectors, arguments.column or COLUMN)
    encoder = pretrained.load_encoder(arguments.encoder, "encoder", "passage")
    tokenizer = pretrained.load_tokenizer(arguments.generator, "generator")
    kind = pretrained.generator_kind(arguments.generator)
    processor = RagProcessor.for_encoders(
        None,
        encoder,
        pretrained.load_tokenizer(arguments.encoder, "encoder"),
        tokenizer,
        kind=kind,
        template=pretrained.make_template(arguments.template, tokenizer, kind),
        max_passage=arguments.max_passage or MAX_PASSAGE,
    )
    index, _ = indexing.build_index(
        arguments.out,
        _passages(arguments.corpus),
        encoder,
        processor,
        vectors=vectors,
        batch_size=arguments.batch_size,
        block_size=arguments.block_size or BLOCK_ROWS,
        dtype=arguments.dtype,
        device=device_of(arguments),
        origin={"encoder": arguments.encoder, "corpus": arguments.corpus},
    )
    print(f"{arguments.out}: {len(index)} passages, {index.dim} dimensions")
    return 0


def _passages(corpus: str) -> Any:
    from fastrag.data.default import load_passages
    from fastrag.hf.corpora import passages_of
    from fastrag.index.vector_files import load_saved_dataset

    if os.path.isdir(corpus):
        return passages_of(load_saved_dataset(corpus, "--corpus"))
    return load_passages(corpus)


def _verify(arguments: argparse.Namespace) -> int:
    folder = _folder(arguments.folder)
    if folder == Path(arguments.folder):
        from fastrag.index import Index

        n = len(Index.load(folder, verify=True))
        print(f"{arguments.folder}: {n} vectors, all checksums hold")
        return 0
    from fastrag.train.indexing import load_index

    index, _ = load_index(folder.parent, verify=True)
    print(f"{arguments.folder}: {len(index)} passages, all checksums hold")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fastrag.index import FlatIndex, Index, PassageStore, saved

    if arguments.probe is None and (arguments.exact or arguments.k):
        raise ValueError("--probe: expected a number of queries with --exact or --k, got none")
    folder = _folder(arguments.folder)
    index = Index.load(folder)
    beside = folder.parent / "passages" if folder.name == "index" else None
    passages = PassageStore.load(beside) if beside and beside.is_dir() else None
    for name, value in saved.describe(index, passages).items():
        print(labelled(name, str(value), _LABEL))
    if arguments.probe is None:
        return 0
    if arguments.exact:
        exact, source = Index.load(_folder(arguments.exact)), arguments.exact
    elif isinstance(index, FlatIndex):
        raise ValueError(
            "--exact: expected an index of the original vectors, as a FlatIndex searches what it "
            "stores exactly, got none"
        )
    else:
        exact, source = saved.exact_of(index), "its reconstructed vectors"
    k = arguments.k or 10
    found = saved.recall(index, exact, k, arguments.probe)
    n = min(arguments.probe, index.n_live)
    print(f"{f'recall@{k}':<{_LABEL}}{found:.4f}   ({n} queries, against {source})")
    return 0


def _folder(folder: str) -> Path:
    """Return the folder of the index inside a folder of `fastrag index build` or of a run."""
    from fastrag import folders

    root = Path(folder)
    folders.recover(root.absolute())
    while (root / "index").is_dir():
        root /= "index"
    return root


def _dtype(text: str) -> str:
    from fastrag.index.codec import DTYPES

    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {shown(text)}")
    return text


def _template(text: str) -> str | dict[str, Any]:
    """Read a template in the form of a config's `template`."""
    from fastrag.data.templates import TEMPLATES
    from fastrag.train.parsing import parse_yaml

    try:
        value = parse_yaml(text)
    except ValueError:
        value = None
    if isinstance(value, dict) or value in TEMPLATES:
        return value
    raise argparse.ArgumentTypeError(
        f"expected one of {', '.join(TEMPLATES)}, or a YAML mapping of a template's fields, "
        f"got {shown(text)}"
    )

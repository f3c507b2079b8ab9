"""The process in which one provider is checked, measured and timed, at the parent's word.

Requests come as lines of JSON on standard input, replies go as lines of JSON to standard output:

    {"do": "prepare", "shared": ..., ...a case...}  -> {"status": "ok" or why not, "extra_bytes",
                                                        "seconds" of its first call}
    {"do": "go"}                                    -> {"wall": ms, "processor": ms}

`--fastrag FOLDER` takes the package from another checkout, the benchmarks stay these. End of input
ends the process, and thereby the death of the parent.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any, TextIO

OK = "ok"
# A call that takes longer is a turn of its own, and needs no second one to be warm.
LONG_SECONDS = 1.0


class Timed:
    """One provider on one problem."""

    def __init__(self) -> None:
        self.extra: int | None = None
        self.seconds = 0.0

    def prepare(self, case: dict[str, Any]) -> str:
        """Returns "ok", or "unavailable: ...", or "wrong: ..." with the output that is."""
        import torch

        from benchmarks.harness import measure, shared
        from benchmarks.harness.registry import DTYPES, error_of
        from benchmarks.ops import OPS

        shared.take(case.get("shared", {}))
        op, shape, mode = OPS[case["op"]], tuple(case["shape"]), case["mode"]
        provider = op.provider(case["provider"])
        reason = provider.why_not(case["device"], case["dtype"], mode)
        if reason:
            return f"unavailable: {reason}"
        self.device = torch.device(case["device"])
        checked = (op, provider, mode)
        on = (case["dtype"], self.device)
        # The tiny one also loads what is loaded once. The others come after the memory: they could
        # leave a buffer behind that the timed problem then seems not to need.
        wrong = error_of(*checked, op.checked[0], *on)
        if wrong:
            return f"wrong: {wrong}"
        problem = op.make(shape, DTYPES[case["dtype"]], case["seed"], self.device)
        self.call = provider.call(mode, problem)
        if provider.compiles:
            self.call()
        start = time.perf_counter()
        self.extra = measure.extra_bytes(self.call, self.device)
        self.seconds = time.perf_counter() - start
        for other in op.checked[1:]:
            wrong = error_of(*checked, other, *on)
            if wrong:
                return f"wrong: {wrong}"
        long = self.seconds > LONG_SECONDS
        self.n_calls = 1 if long else measure.calls_per_turn(self.call, self.device)
        return OK

    def go(self) -> dict[str, float]:
        from benchmarks.harness import measure

        return asdict(measure.one_turn(self.call, self.device, self.n_calls))


def reply_to(timed: Timed, request: dict[str, Any]) -> dict[str, Any]:
    # Whatever a peer raises is its result: the run goes on with the others.
    try:
        if request["do"] == "go":
            return {"status": OK, **timed.go()}
        status = timed.prepare(request)
        return {"status": status, "extra_bytes": timed.extra, "seconds": timed.seconds}
    except Exception as error:
        text = " ".join(str(error).split())
        return {"status": f"failed: {type(error).__name__}: {text[:200]}"}


def serve(requests: TextIO, replies: TextIO) -> None:
    timed = Timed()
    for line in requests:
        replies.write(json.dumps(reply_to(timed, json.loads(line))) + "\n")
        replies.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="serves benchmarks.run")
    parser.add_argument("--fastrag", help="checkout to take the package from")
    tree = parser.parse_args().fastrag
    # Inductor's own pool of processes would compile while another provider has its turn.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not a reply
    if tree:
        sys.path.insert(0, tree)
    # Now, while other workers do the same, and not at the first request, when they wait.
    importlib.import_module("benchmarks.ops")
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()

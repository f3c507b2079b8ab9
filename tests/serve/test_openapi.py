"""Requests drawn from the OpenAPI document: the server answers all of them as the document says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.live import Live

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


@pytest.mark.parametrize("kind", ["vectors", "answers"])
def test_the_server_keeps_to_its_document(kind: str, request: pytest.FixtureRequest) -> None:
    live: Live = request.getfixturevalue(kind)
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    names = {f"{each.method.upper()} {each.path}" for each in operations}
    expected = {"POST /retrieve", "GET /health", "GET /metrics"}
    assert names == expected | ({"POST /answer"} if kind == "answers" else set())
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            try_all(operation, mode)
    assert live.request("GET", "/health")[0] == 200


def try_all(operation: Any, mode: schemathesis.GenerationMode) -> None:
    """Send drawn requests of one operation, all right or each wrong somewhere."""
    if operation.method == "get" and mode == schemathesis.GenerationMode.NEGATIVE:
        return

    @settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    one()

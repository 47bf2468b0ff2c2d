"""A report as JSON: of the schema it names, and its measurements read back as they were."""

import json
from dataclasses import replace
from typing import Any

import pytest

from quantkit.report.document import SCHEMA, document_schema, measurements_of
from quantkit.report.measurements import Measurements
from tests.synthetic_reports import document, run


def test_measurements_are_read_back() -> None:
    made = document()
    content = json.loads(json.dumps(made.to_json()))
    assert measurements_of(content) == made.measured
    assert content["schema"] == SCHEMA
    assert content["run"] == json.loads(json.dumps(made.report.to_json()))
    assert content["command"] == (
        "quantkit quantize --recipe out/Llama-3.1-70B-W4A16/quantkit-report.json --output out/Llama-3.1-70B-W4A16-again"
    )
    assert document(replace(run(1), model=None)).command is None
    assert measurements_of(content | {"schema": "quantkit.report/2"}) is None
    assert measurements_of(content | {"measured": {"texts": 3}}) is None
    assert measurements_of([]) is None


@pytest.mark.parametrize("measured", [None, Measurements()], ids=["all", "nothing"])
def test_the_schema_describes_it(measured: Measurements | None) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = document_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content: dict[str, Any] = json.loads(json.dumps(document(run(1), measured).to_json()))
    validator.validate(content)
    wrong = [
        content | {"schema": "other/1"},
        content | {"verdict": content["verdict"] | {"level": "splendid"}},
        content | {"measured": content["measured"] | {"tasks": [{"task": "piqa"}]}},
        {key: value for key, value in content.items() if key != "run"},
    ]
    assert not any(validator.is_valid(one) for one in wrong)


def test_nothing_missing_is_zero() -> None:
    bare = document(replace(run(1), held_out=None), Measurements()).to_json()["measured"]
    assert {key: value for key, value in bare.items() if value} == {}
    assert bare["speed"] is None

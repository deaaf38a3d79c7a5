"""The report format: complete, repeatable, and never with a number that is not one."""

import json
import sys
from datetime import datetime

import pytest

from sana import __version__
from sana.metrics import report

FIELDS = [
    "metric",
    "values",
    "n",
    "protocol",
    "settings",
    "weights",
    "dtype",
    "command",
    "hardware",
    "versions",
    "date",
]


def example(**changes):
    arguments = {
        "metric": "GenEval",
        "values": {"overall": 0.5, "tags": {"colors": 0.25}},
        "n": 8,
        "protocol": "shapes",
    }
    return report.make_report(**arguments | {"settings": {"steps": 20}} | changes)


def test_file_holds_every_field_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", "--output", "a b.json"])
    path = example(weights={"transformer": "ab"}, dtype="float32").save(tmp_path / "deep" / "report.json")
    read = json.loads(path.read_text(encoding="utf-8"))
    assert list(read) == FIELDS
    assert read["values"] == {"overall": 0.5, "tags": {"colors": 0.25}}
    assert (read["n"], read["weights"], read["dtype"]) == (8, {"transformer": "ab"}, "float32")
    assert read["command"] == "python scripts/evaluate.py --output 'a b.json'", "can be pasted into a shell"
    assert datetime.fromisoformat(read["date"]).utcoffset().total_seconds() == 0
    assert read["versions"]["python"] == sys.version.split()[0]
    assert read["versions"]["sana"] == __version__
    assert {"torch", "numpy"} <= set(read["versions"])
    assert "cores" in read["hardware"]


def test_parts_without_a_model_are_empty():
    made = example()
    assert (made.weights, made.dtype) == ({}, None)


def test_the_dtype_is_that_of_what_drew_the_pictures():
    assert example(settings={"generation": {"dtype": "bfloat16"}}).dtype == "bfloat16"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value):
    with pytest.raises(ValueError, match=r"tags\.colors"):
        example(values={"overall": 0.5, "tags": {"colors": value}})


def test_a_report_needs_samples():
    with pytest.raises(ValueError, match="n=0"):
        example(n=0)

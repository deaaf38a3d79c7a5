"""`train.online_metric`: a training that measures itself, and goes on as without it."""

import json

import pytest

from sana.evaluation import suites
from sana.training.online_metric import OnlineMetric
from sana.training.tracker import read_history
from tests.factories import write_model
from tests.training import micro
from tests.training.micro import trainer

MEASURED = ("--train.online_metric=true", "--train.eval_metric_step=4", "--train.online_metric_prompts=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def losses(folder):
    return [row["loss"] for row in read_history(folder / "history.jsonl")]


def test_training_measures_itself_and_goes_on_as_without(model, tmp_path):
    assert trainer(model, tmp_path / "without", "--train.ema_update=false").train()
    run = trainer(model, tmp_path / "with", *MEASURED, "--train.ema_update=false")
    tracked, start = [], run._start_records

    def start_records():
        tracker = start()
        tracker.scalars = lambda values, step: tracked.append((step, values))
        return tracker

    run._start_records = start_records
    assert run.train() and run.model.training
    assert losses(tmp_path / "with") == losses(tmp_path / "without") and len(losses(tmp_path / "with")) == 6

    folder = tmp_path / "with" / "metric_helper"
    reports = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [report["metric"] for report in reports] == ["GenEval (shapes)"] * 2, "after step 4 and at the end"
    assert [report["n"] for report in reports] == [24, 24]
    assert reports[0]["settings"]["generation"]["seed"] == 42
    assert [step for step, values in tracked if "metrics/GenEval (shapes)/overall" in values] == [4, 6]
    assert [path.name for path in folder.iterdir()] == ["results.jsonl"], "pictures are removed"
    assert {path.name for path in (tmp_path / "with/checkpoints").glob("*step_4*")}, "saved before"


def test_no_failure_ends_the_run(model, tmp_path, caplog, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(suites, "generate", broken)
    monkeypatch.setattr(micro.Trainer, "export", lambda *_: None)
    assert trainer(model, tmp_path / "a", *MEASURED).train()
    assert caplog.text.count("shapes: RuntimeError: no room") == 2
    monkeypatch.setattr("sana.training.online_metric.load_text_encoder", broken)
    assert trainer(model, tmp_path / "b", *MEASURED).train()
    assert "no online metric at step 4: RuntimeError: no room" in caplog.text
    missing = ("--train.online_metric_suites=[geneval]",)
    monkeypatch.undo()
    assert trainer(model, tmp_path / "c", *MEASURED, *missing).train()
    assert "geneval: ValueError: no such file or folder" in caplog.text


def test_what_is_wrong_is_said_before_the_first_step(model, tmp_path, caplog):
    with pytest.raises(ValueError, match="unknown suite 'fid'"):
        trainer(model, tmp_path, *MEASURED, "--train.online_metric_suites=[fid]")
    sharded = micro.config(model, tmp_path, *MEASURED, "--train.use_fsdp=true")
    assert OnlineMetric.of(sharded) is None
    assert "no effect with train.use_fsdp: run scripts/evaluate.py" in caplog.text
    assert OnlineMetric.of(micro.config(model, tmp_path)) is None


@pytest.mark.slow
def test_one_of_two_processes_measures(model, tmp_path):
    assert micro.finish(micro.start_group(2, model, tmp_path, MEASURED)) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "metric_helper/results.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows] == [24, 24]
    assert len(losses(tmp_path)) == 6

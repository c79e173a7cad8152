"""The record of an audit survives its file, of this version and of the one before."""

import json

import pytest
from audit_samples import sample_audit, sample_json

from iet_finetune import UserError
from iet_finetune.audit.report.record import AuditRecord


def test_a_record_is_written_and_read_back_whole():
    record = sample_audit()
    assert record.to_json() == sample_json()
    assert list(record.to_json()) == list(sample_json())
    assert AuditRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def old(values):
    """The same with the keys of version 1."""
    if isinstance(values, dict):
        return {name.replace("baseline", "null"): old(each) for name, each in values.items()}
    return [old(each) for each in values] if isinstance(values, list) else values


def test_version_1_is_read_with_its_nulls_as_baselines():
    metrics = sample_json()["metrics"]
    metrics["similarity_p95_effnet_lite0"] |= {"baseline_low": 0.7, "baseline_high": 0.74}
    record = AuditRecord.from_json(old(sample_json(metrics=metrics)) | {"version": 1})
    assert record == sample_audit(metrics=metrics)
    assert record.metrics["f_mem"].baseline == 0.0
    assert record.metrics["similarity_p95_effnet_lite0"].of_baseline.low == 0.7
    assert list(record.histograms["ratio"].series) == ["generated", "baseline"]


def test_what_is_missing_is_empty_and_what_is_unknown_is_ignored():
    bare = {"format": "iet_finetune.audit", "version": 2}
    assert AuditRecord.from_json(bare | {"later": [1], "metrics": None}) == AuditRecord()


@pytest.mark.parametrize("values", [None, [], {}, {"format": "iet_finetune.comparison", "version": 2}])
def test_something_else_is_refused_by_the_name_of_its_file(values):
    with pytest.raises(UserError, match=r"^`a.json` is not an audit of iet_finetune"):
        AuditRecord.from_json(values, "`a.json`")

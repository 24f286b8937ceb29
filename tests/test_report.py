"""The result type of half-space reporting."""

import dataclasses

import numpy as np
import pytest

import hsr_attention as hsr


@pytest.fixture
def report():
    return hsr.Report(
        np.array([0, 2, 2, 3]),
        np.array([1, 4, 0]),
        np.array([0.5, 2.0, -1.0], np.float32),
        hsr.Work(sketch_scored=12, refined=5, full_scored=3, reported=3),
    )


def test_rows(report):
    assert len(report) == 3
    assert report.counts.tolist() == [2, 0, 1]
    assert [indices.tolist() for indices, _ in report] == [[1, 4], [], [0]]
    indices, scores = report.row(-1)
    assert indices.tolist() == [0] and scores.tolist() == [-1.0]
    np.testing.assert_array_equal(report.row(2)[0], report.row(-1)[0])


@pytest.mark.parametrize("i", [3, -4, 100])
def test_rows_outside(report, i):
    with pytest.raises(IndexError, match=rf"row must lie in \[0, 3\), got {i}"):
        report.row(i)


def test_work(report):
    assert report.work.keys_scored == 20
    assert hsr.Work() == hsr.Work(0, 0, 0, 0, 0)


def test_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.indptr = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.work.reported = 4


def test_an_empty_report():
    report = hsr.FlatIndex(np.zeros((0, 3), np.float32)).report(np.zeros((0, 3), np.float32), 0.0)
    assert len(report) == 0 and list(report) == [] and report.counts.size == 0
    assert report.indptr.tolist() == [0]

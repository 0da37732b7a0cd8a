"""The record of attempts: when a job is not started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_dist.cluster.attempts import AttemptLog, RepeatedFailureError


def test_two_failures_at_one_step_stop_the_job(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path, "7")
    for _ in range(2):
        log.begin(nodes=["a"])
        log.progress(12)
        log.error(node="a", rank=3, error=RuntimeError("lost"))
        log = AttemptLog(tmp_path, "7")
    with pytest.raises(RepeatedFailureError, match="twice in a row after step 12 .* rank 3 on a .* RuntimeError: lost"):
        log.begin(nodes=["a"])
    assert (tmp_path / "7.stopped").exists()


@pytest.mark.parametrize("between", ["progress", "requeued", "a killed write"])
def test_other_failures_do_not(tmp_path: Path, between: str) -> None:
    for attempt in range(4):
        log = AttemptLog(tmp_path, "7")
        log.begin(nodes=["a"])
        log.progress(attempt if between == "progress" else 12)
        if between == "requeued" and attempt % 2:
            log.end("requeued")
        if between == "a killed write" and attempt == 1:
            log.end("requeued")
            with log.path.open("a") as file:
                file.write('{"event": "err')
    begun = [event for event in AttemptLog(tmp_path, "7").events() if event["event"] == "begin"]
    assert len(begun) == (3 if between == "a killed write" else 4)  # the line after the killed write is lost with it
    assert not (tmp_path / "7.stopped").exists()


def test_a_job_that_has_finished_is_not_requeued(tmp_path: Path) -> None:
    """Whatever its processes end with: the batch script looks for the mark."""
    log = AttemptLog(tmp_path, "7")
    log.begin(nodes=["a"])
    log.end("requeued")
    assert not (tmp_path / "7.stopped").exists()
    assert not log.was_cancelled()
    log.begin(nodes=["a"])
    log.end("finished")
    assert (tmp_path / "7.stopped").exists()
    assert not log.was_cancelled()


def test_an_error_after_the_end_is_of_the_shutdown(tmp_path: Path) -> None:
    """Rank 0 has requeued the job; the others are ended after it, and lose it while they wait for its status."""
    for _ in range(3):
        log = AttemptLog(tmp_path, "7")
        log.begin(nodes=["a"])
        log.progress(3)
        log.end("requeued")
        log.error(node="a", rank=1, error=RuntimeError("Connection closed by peer"))
    assert {event["outcome"] for event in log.events() if event["event"] == "end"} == {"requeued"}
    log.begin(nodes=["a"])
    log.end("stopped")
    log.error(node="a", rank=1, error=RuntimeError("Connection closed by peer"))
    assert log.was_cancelled()

"""A signal to one rank: all ranks end in time, without a launcher that would end them, and the run resumes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers.kills import STEPS, WITHIN, Kill, attempt, last_step
from helpers.training import recorded
from lowrank_dist.training.stopping import TERMINATED

#: What is sent, when, to whom, and the step of the newest checkpoint after it, at least.
KILLS = {
    "set-up": (Kill(moment="set-up", number=signal.SIGKILL, victim=0), 0),
    "engine": (Kill(moment="engine", number=signal.SIGINT, victim=1), 0),
    "walk": (Kill(moment="walk", number=signal.SIGTERM, victim=1), 0),
    "training": (Kill(moment="training", number=signal.SIGTERM, victim=1, occurrence=3), 3),
    "save": (Kill(moment="save", number=signal.SIGTERM, victim=0, occurrence=2), 4),
}


@pytest.mark.matrix
def test_a_killed_run_ends_on_all_ranks_and_resumes(llama: Path, tmp_path: Path) -> None:
    """One run, killed in five attempts at five moments; SIGTERM in training saves the step and ends all ranks alike."""
    output = tmp_path / "out"
    for moment, (kill, step) in KILLS.items():
        found = attempt(llama, output, kill, None)
        text = output.with_suffix(".log").read_text()[-3000:]
        assert found["seconds"] is not None, text
        assert found["survivors"] == 0, text
        assert found["seconds"] < WITHIN, text
        assert last_step(output) >= step, (moment, text)
        if moment == "training":
            assert last_step(output) == step, text
            assert found["status"] == TERMINATED, text
    assert attempt(llama, output, None, None)["status"] == 0
    assert last_step(output) == STEPS
    assert attempt(llama, tmp_path / "undisturbed", None, None)["status"] == 0
    # a resumed run has the same numbers; fp32 sums over ranks in another order would differ by 1e-7
    assert recorded(output.with_suffix(".losses")) == pytest.approx(recorded(tmp_path / "undisturbed.losses"), abs=1e-6)

"""The lab: a real SLURM of five nodes on loopback, one for every worker of the session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from helpers.sft import save_material
from helpers.slurm import SCRIPT, Job, Lab, announced, arguments
from lowrank_dist.cli import main

UNAVAILABLE = 69  # exit status of lab.sh where the daemons are at fault, or the machine
COMMANDS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")


def why_not() -> str | None:
    """What keeps SLURM from running here; None where nothing does."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make test-slurm installs Debian's packages"
    if os.getuid() != 0:
        return "slurmctld and its nodes are started as root"
    inside = "hostname node1 && mount --bind /etc/hosts /etc/hosts"  # what a node does
    if subprocess.run(["unshare", "--uts", "--mount", "sh", "-c", inside], capture_output=True).returncode:
        return "no namespaces can be made here"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its jobs have written, and what SLURM did with them."""
    report = yield
    values = getattr(item, "funcargs", {})
    jobs = [*values.get("beside", {}).values(), *(value for value in values.values() if isinstance(value, Job))]
    roots = {*(job.root for job in jobs), *([values["tmp_path"]] if "tmp_path" in values else [])}
    for root in sorted(roots) if report.failed else ():
        for pattern in ("*_attempts.jsonl", "*_log.out", "log"):
            for path in sorted(root.rglob(pattern)):
                report.sections.append((f"{path.relative_to(root.parent)}", path.read_text(errors="replace")[-20_000:]))
    if report.failed and "lab" in values:
        said = (values["lab"].directory / "log" / "slurmctld.log").read_text(errors="replace")
        report.sections.append(("slurmctld", said[-10_000:]))
    return report


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("lab")
    for parent in (directory, *directory.parents):  # munge wants the way to its socket open
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    with (directory / "up").open("w") as said:  # a file: daemons keep what they were given open
        up = subprocess.run([SCRIPT, "up", directory], stdout=said, stderr=said, timeout=300)
    if up.returncode == UNAVAILABLE:
        subprocess.run([SCRIPT, "down", directory], timeout=240)
        pytest.skip(f"SLURM does not run here: {(directory / 'up').read_text()}")
    assert up.returncode == 0, (directory / "up").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(directory / "etc" / "slurm.conf"))
        yield Lab(directory)
        subprocess.run([SCRIPT, "down", directory], check=True, timeout=240)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its tokenizer and examples of equal length."""
    records = [{"prompt": f"{i:03d} + {i:03d} = ", "completion": f"{2 * i:03d}"} for i in range(96)]
    return save_material(tmp_path_factory.mktemp("material"), records)


@pytest.fixture(scope="session", autouse=True)
def environment_of_jobs() -> Iterator[None]:
    """Jobs inherit the environment of who submits them: they find the helpers of the tests, and this Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, to the end."""
    root = tmp_path_factory.mktemp("undisturbed")
    with redirect_stdout(StringIO()) as output:
        assert main(["submit", *arguments(material, root), "--follow"]) == 0
    (job,) = announced(root, output.getvalue())
    assert f"job {job.id}: COMPLETED" in output.getvalue()  # what --follow says last
    assert "`Trainer.fit` stopped: `max_steps=10` reached." in output.getvalue()
    return job

"""From options to a submitted job, through submitit."""

from __future__ import annotations

import io
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from lowrank_dist.cluster.attempts import AttemptLog
from lowrank_dist.slurm.checks import JobShape, check, newest_step
from lowrank_dist.slurm.job import TrainingJob, requeue_script
from lowrank_dist.slurm.options import FILES, SubmitError, SubmitOptions, point_overrides
from lowrank_dist.slurm.sweep import check_points, directory_names, own_directory
from lowrank_dist.storage.disk import check_writable, private_directory
from lowrank_dist.training.fit_cli import parse_fit

#: States of a job that will not go on.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_POLL = 1.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job, checked and ready to be submitted.

    Attributes
    ----------
    options, shape
        Options of the job, and the resources that its configuration requests.
    folder
        Folder for logs, pickles and records of attempts. It is new for every submission, so that no stale file is read.
    jobs, roots
        The job, or the jobs of a sweep, and the ``default_root_dir`` of each.
    """

    options: SubmitOptions
    shape: JobShape
    folder: Path
    jobs: tuple[TrainingJob, ...]
    roots: tuple[Path, ...]

    def script(self) -> str:
        """Text of the file for sbatch, which need not be there.

        Raises
        ------
        SubmitError
            For ``--cluster local``, which needs no such file.
        """
        if self.options.cluster == "local":
            raise SubmitError("--dry-run prints the file for sbatch, but --cluster local needs none; drop one of them")
        with _anywhere():
            executor = self._executor()
        slurm = executor._executor
        if len(self.jobs) > 1:
            slurm.parameters["map_count"] = len(self.jobs)
        return str(slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run"))

    def submit(self) -> list[Any]:
        """Submit and return submitit's jobs. Only the owner can read the folder.

        Raises
        ------
        SubmitError
            Where sbatch is not on PATH, or refuses the jobs. Then nothing is left.
        """
        if self.options.cluster == "slurm" and shutil.which("sbatch") is None:
            raise SubmitError(
                "sbatch is not on PATH: submit from a login node, or use --cluster local; launch/qpissa.sbatch is a "
                "batch file for sites without submitit"
            )
        new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        executor = self.executor()
        try:
            with redirect_stderr(io.StringIO()) as said, executor.batch():  # submitit prints what it raises
                jobs = [executor.submit(job) for job in self.jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            found = _one_line(str(error)) or str(error.__cause__)
            if not isinstance(error.__cause__, subprocess.CalledProcessError):
                raise SubmitError(
                    f"sbatch has not said whether it has taken the job ({found}); see squeue, and {self.folder}"
                ) from error
            _remove(new)
            raise SubmitError(f"sbatch refuses the job: {found}; nothing was submitted") from error
        sys.stderr.write(said.getvalue())
        return jobs

    def executor(self) -> Any:
        """Submitit's executor of the jobs, whose folder it makes.

        Raises
        ------
        InputError
            If nothing can be written where it should be.
        """
        check_writable(self.folder.parent.parent, "trainer.default_root_dir")
        private_directory(self.folder.parent, uses_contents=False)
        self.folder.mkdir(mode=0o700)  # new, or an error
        return self._executor()

    def _executor(self) -> Any:
        options, shape = self.options, self.shape
        executor = submitit.AutoExecutor(folder=self.folder, cluster=options.cluster)
        executor.update_parameters(
            name=options.job_name,
            timeout_min=options.minutes,
            nodes=shape.nodes,
            tasks_per_node=shape.devices,
            stderr_to_stdout=True,
            **({"gpus_per_node": shape.devices} if shape.on_gpu else {}),
            **({"cpus_per_task": options.cpus_per_task} if options.cpus_per_task else {}),
            **({"mem_gb": options.mem_gb} if options.mem_gb else {}),
        )
        if options.cluster == "local":
            if options.setup:
                executor.update_parameters(local_setup=list(options.setup))
            executor._executor.parameters["signal_delay_s"] = options.grace
            return executor
        named = {name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
        executor.update_parameters(
            **{f"slurm_{name}": value for name, value in named.items() if value is not None},
            slurm_signal_delay_s=options.grace,
            slurm_setup=list(options.setup),
            slurm_teardown=requeue_script(str(self.folder)),
            # a task that fails ends the others; after the first task that succeeds, the others have a minute
            slurm_srun_args=["--kill-on-bad-exit=1", "--wait=60", *self._tasks_of_step()],
            slurm_array_parallelism=options.parallelism,
            slurm_additional_parameters=self._additional(),
        )
        if len(shape.counts) > 1:
            del executor._executor.parameters["ntasks_per_node"]
        return executor

    def _tasks_of_step(self) -> list[str]:
        """Arguments of srun that set the tasks per node, for jobs with a range of nodes.

        sbatch must not set them: SLURM 22.05 computes the job's number of tasks once, for its first nodes, and after a
        requeue waits for enough nodes for that number. It computes the CPUs per node again.
        """
        options, shape = self.options, self.shape
        if len(shape.counts) == 1:
            return []
        cpus = [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
        return [f"--ntasks-per-node={shape.devices}", *cpus]

    def _additional(self) -> dict[str, Any]:
        additional: dict[str, Any] = {"requeue": True}
        if len(self.shape.counts) > 1:
            additional["nodes"] = f"{self.shape.counts[0]}-{self.shape.counts[-1]}"
            additional["mincpus"] = self.shape.devices * (self.options.cpus_per_task or 1)
        for option in self.options.sbatch:
            name, equals, value = option.partition("=")
            additional[name] = value if equals else True
        return additional


def _one_line(text: str) -> str:
    """What a program said, as a part of a message."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _remove(new: Sequence[Path]) -> None:
    """Remove a folder, and the directories above it that are as new and hold nothing else."""
    folder, *above = new
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for path in above:
            path.rmdir()


@contextmanager
def _anywhere() -> Iterator[None]:
    """Inside, submitit makes its executor for SLURM also where there is no srun."""
    kind = submitit.SlurmExecutor
    known = vars(kind)["affinity"]
    kind.affinity = classmethod(lambda cls: 2)
    try:
        yield
    finally:
        kind.affinity = known


def prepare(options: SubmitOptions) -> Submission:
    """Check a job and every point of its sweep against the configuration.

    Raises
    ------
    SubmitError
        For the first mistake found.
    SystemExit
        With status 2, after a message from the parser of ``lowrank-dist fit``, for an unknown key or a value of a wrong
        type.
    """
    config = tuple(_absolute(path) for path in options.config)

    def arguments(point: dict[str, str]) -> tuple[list[str], list[str]]:
        """Files and overrides of a point, which writes where all do."""
        files = [*config, *([_absolute(point[FILES])] if FILES in point else [])]
        return files, [*options.overrides, *point_overrides(point)]

    def parse(files: Sequence[str], overrides: Sequence[str]) -> Any:
        return parse_fit([*(f"--config={path}" for path in files), *overrides])

    @cache
    def with_file(file: str | None) -> Any:
        """Settings of all points with this file, but for their other keys."""
        return parse(config if file is None else [*config, _absolute(file)], options.overrides)

    base = with_file(None)
    root = Path(base.trainer.default_root_dir or ".").absolute()
    folder = root / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    jobs, shapes, parsed = [], [], []
    for point, name in zip(options.points, directory_names(options.points), strict=True):
        files, overrides = arguments(point)
        if point:
            overrides += own_directory(root / name, with_file(point.get(FILES)))
        # without the file of a point the configuration need not be whole: points are checked, the base is not
        parsed.append(parse(files, overrides) if point else base)
        shapes.append(check(options, parsed[-1]))
        jobs.append(
            TrainingJob(
                config=tuple(files),
                overrides=tuple(overrides),
                folder=str(folder),
                batches=shapes[-1].batches,
                grace=options.grace,
                timeout=options.collective_timeout if shapes[-1].has_timeout else None,
            )
        )
    check_points(options.points, shapes, parsed)
    warnings = dict.fromkeys(warning for shape in shapes for warning in shape.warnings)
    return Submission(
        options=options,
        shape=replace(shapes[0], root=root, warnings=tuple(warnings)),
        folder=folder,
        jobs=tuple(jobs),
        roots=tuple(shape.root for shape in shapes),
    )


def _absolute(config: str) -> str:
    if not Path(config).is_file():
        raise SubmitError(f"--config {config}: no such file; pass a YAML file of `lowrank-dist fit`")
    return str(Path(config).absolute())


def announce(submission: Submission, jobs: list[Any]) -> None:
    """Print what was submitted, where its logs are, and how to follow and cancel it."""
    for job, root in zip(jobs, submission.roots, strict=True):
        describe(submission, job, root)
    print(f"  follow  tail -F {jobs[0].paths.stdout}")
    print(f"  cancel  scancel {jobs[0].job_id.split('_')[0]}")


def describe(submission: Submission, job: Any, root: Path) -> None:
    """Print what one job is, and where its logs are."""
    step = newest_step(root)
    resumes = "" if step is None else f", resumes from the checkpoint of step {step}"
    print(f"job {job.job_id}: {submission.options.job_name} in {root}{resumes}")
    print(f"  log     {job.paths.stdout}")
    print(f"  others  {job.paths.folder / (job.job_id + '_RANK_log.out')}")


def follow(submission: Submission, job: Any, *, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Print the log of rank 0 as it grows, until the job has ended; return 0 if the job completed, else 1.

    Ctrl-C stops printing; a SLURM job continues. `meanwhile` is called after every poll.
    """
    position = 0
    while True:
        state = state_of(submission, job)
        position = _print_from(job.paths.stdout, position)
        if state in ENDED:
            print(f"job {job.job_id}: {state}")
            return 0 if state == "COMPLETED" else 1
        meanwhile()
        time.sleep(_POLL)


def _print_from(path: Path, position: int) -> int:
    if not path.exists():
        return position
    with open(path, "rb") as log:
        log.seek(position)
        text = log.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


def state_of(submission: Submission, job: Any) -> str:
    """State of the job in SLURM's terms. It does not need SLURM's accounting, which some sites lack."""
    if submission.options.cluster == "local":
        return _local_state(job)
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job.job_id}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "UNKNOWN"
    if done.stdout.split():
        return done.stdout.split()[0]
    if done.returncode and "Invalid job id" not in done.stderr:
        return "UNKNOWN"  # slurmctld does not answer
    # SLURM forgets a job some minutes after its end
    return "COMPLETED" if job.paths.result_pickle.exists() else "FAILED"


def _local_state(job: Any) -> str:
    if job.get_info()["jobState"] == "RUNNING":
        return "RUNNING"
    tasks = [job.task(rank) for rank in range(job.num_tasks)]
    well = all(task.paths.result_pickle.exists() and task.exception() is None for task in tasks)
    if not well and AttemptLog(job.paths.folder, job.job_id).was_cancelled():
        return "CANCELLED"
    return "COMPLETED" if well else "FAILED"

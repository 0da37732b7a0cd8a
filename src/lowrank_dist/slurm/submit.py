"""From options to a submitted job, through submitit."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import submitit

from lowrank_dist.cluster.attempts import AttemptLog
from lowrank_dist.cluster.signals import StopSignals
from lowrank_dist.slurm.checks import JobShape, check, checkpoint_directories, newest_step
from lowrank_dist.slurm.job import TrainingJob, requeue_script
from lowrank_dist.slurm.options import SubmitError, SubmitOptions, point_overrides
from lowrank_dist.storage.disk import private_directory
from lowrank_dist.training.fit_cli import parse_fit

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
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
            Where sbatch is not on PATH.
        """
        if self.options.cluster == "slurm" and shutil.which("sbatch") is None:
            raise SubmitError(
                "sbatch is not on PATH: submit from a login node, or use --cluster local; launch/qpissa.sbatch is a "
                "batch file for sites without submitit"
            )
        self.folder.parent.parent.mkdir(parents=True, exist_ok=True)
        private_directory(self.folder.parent, uses_contents=False)
        self.folder.mkdir(mode=0o700)  # new, or an error
        executor = self._executor()
        with executor.batch():
            return [executor.submit(job) for job in self.jobs]

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
            slurm_array_parallelism=options.array_parallelism,
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
    for path in options.config:
        if not Path(path).is_file():
            raise SubmitError(f"--config {path}: no such file; pass a YAML file of `lowrank-dist fit`")
    config = tuple(str(Path(path).absolute()) for path in options.config)
    files = [f"--config={path}" for path in config]
    settings = parse_fit([*files, *options.overrides])
    shape = check(options, settings)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = shape.root / "jobs" / name
    jobs, roots, parsed = [], [], []
    for point in options.points:
        overrides = [*options.overrides, *point_overrides(point), *_own_directory(point, settings)]
        parsed.append(parse_fit([*files, *overrides]) if point else settings)
        roots.append(check(options, parsed[-1]).root if point else shape.root)
        jobs.append(
            TrainingJob(
                config=config,
                overrides=tuple(overrides),
                folder=str(folder),
                batches=shape.batches,
                grace=options.grace,
                timeout=options.collective_timeout if shape.has_timeout else None,
            )
        )
    _check_distinct_directories(parsed)
    return Submission(options=options, shape=shape, folder=folder, jobs=tuple(jobs), roots=tuple(roots))


def _check_distinct_directories(settings: Sequence[Any]) -> None:
    """Raise SubmitError if two points of a sweep would write their checkpoints to the same directory."""
    seen: set[Path] = set()
    for of_point in settings:
        for directory in checkpoint_directories(of_point):
            if directory in seen:
                raise SubmitError(
                    f"--sweep: every point would write its checkpoints to dirpath={directory}; remove dirpath from the "
                    "checkpoint callback, and each point writes below its own default_root_dir"
                )
            seen.add(directory)


def _own_directory(point: dict[str, str], settings: Any) -> list[str]:
    """Arguments that give a point of a sweep a directory of its own, below that of the configuration."""
    if not point:
        return []
    root = str(settings.trainer.default_root_dir or ".")
    own = str(Path(root, ",".join(f"{key.split('.')[-1]}={value}" for key, value in point.items())))
    arguments = [f"--trainer.default_root_dir={own}"]
    if getattr(getattr(settings.trainer.logger, "init_args", None), "save_dir", None) == root:
        arguments.append(f"--trainer.logger.init_args.save_dir={own}")
    return arguments


def announce(submission: Submission, jobs: list[Any]) -> None:
    """Print what was submitted, where its logs are, and how to follow and cancel it."""
    name = submission.options.job_name
    for job, root in zip(jobs, submission.roots, strict=True):
        step = newest_step(root)
        resumes = "" if step is None else f", resumes from the checkpoint of step {step}"
        print(f"job {job.job_id}: {name} in {root}{resumes}")
        print(f"  log     {job.paths.stdout}")
        print(f"  others  {job.paths.folder / (job.job_id + '_RANK_log.out')}")
    print(f"  follow  tail -F {jobs[0].paths.stdout}")
    cancel = f"scancel {jobs[0].job_id.split('_')[0]}" if submission.options.cluster == "slurm" else "Ctrl-C"
    print(f"  cancel  {cancel}")


def follow(submission: Submission, job: Any, *, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Print the log of rank 0 as it grows, until the job has ended; return 0 if the job completed, else 1.

    Ctrl-C stops printing; a SLURM job continues. `meanwhile` is called after every poll.
    """
    position = 0
    while True:
        state = _state(submission, job)
        position = _print_from(job.paths.stdout, position)
        if state in _ENDED:
            print(f"job {job.job_id}: {state}")
            return 0 if state == "COMPLETED" else 1
        meanwhile()
        time.sleep(_POLL)


class Forwarding:
    """Forwards SIGUSR2 and SIGTERM to the tasks of jobs on this machine, as SLURM does.

    Without it SIGUSR2 would kill submitit's controller, which started the tasks, and leave the tasks running. Signals
    that arrive before the tasks have started are kept until then.

    Attributes
    ----------
    jobs
        Jobs of submitit.
    """

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self._waiting: list[int] = []

    def __enter__(self) -> Forwarding:
        self._before = {number: signal.signal(number, self._receive) for number in StopSignals.REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._waiting.append(number)
        self.deliver()

    def deliver(self) -> None:
        """Send waiting signals, if the tasks have started."""
        tasks = [task for job in self.jobs for task in _tasks(job)]
        if not tasks:
            return
        numbers, self._waiting = self._waiting, []
        for number in numbers:
            for task in tasks:
                with suppress(psutil.NoSuchProcess):
                    task.send_signal(number)


def _tasks(job: Any) -> list[psutil.Process]:
    """Processes that run the tasks of a job on this machine, without their child processes."""
    running: dict[int, tuple[psutil.Process, int]] = {}
    with suppress(psutil.NoSuchProcess):  # it has just ended
        for process in psutil.Process(job._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # this one too, reaped or not
                if "submitit.core._submit" in process.cmdline():
                    running[process.pid] = process, process.ppid()
    return [process for process, parent in running.values() if parent not in running]


def _print_from(path: Path, position: int) -> int:
    if not path.exists():
        return position
    with open(path, "rb") as log:
        log.seek(position)
        text = log.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


def _state(submission: Submission, job: Any) -> str:
    """State of the job in SLURM's terms. It does not need SLURM's accounting, which some sites lack."""
    if submission.options.cluster == "local":
        return _local_state(job)
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job.job_id}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
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

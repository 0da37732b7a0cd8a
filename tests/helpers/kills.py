"""Signals to one rank of a training run, at chosen moments: do all ranks end in time, and does the run resume?

As a program (``make kills``) a loop over random moments, signals, ranks and launchers. Tests take one `attempt`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from helpers.ranks import CONTEXT, environment_of, meeting_place

STEPS = 10
#: Seconds within which all ranks must have ended.
WITHIN = 30.0
MOMENTS = ("import", "rendezvous", "set-up", "walk", "engine", "training", "validation", "save")
LAUNCHERS = ("torchrun", "lightning")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A signal to rank `victim`, `delay` seconds after it has come to `moment` for the `occurrence`-th time."""

    moment: str
    number: int = signal.SIGTERM
    victim: int = 1
    occurrence: int = 1
    delay: float = 0.0


class Trigger:
    """Sends the signal to this process when its moment has come, and writes down when."""

    def __init__(self, kill: Kill | None, rank: int, record: Path) -> None:
        self.kill = kill if kill is not None and kill.victim == rank else None
        self.left, self.record = 0 if self.kill is None else self.kill.occurrence, record

    def at(self, moment: str) -> None:
        if self.kill is None or moment != self.kill.moment:
            return
        self.left -= 1
        if self.left == 0:
            if self.kill.delay:
                threading.Timer(self.kill.delay, self.fire).start()
            else:
                self.fire()

    def fire(self) -> None:
        assert self.kill is not None
        self.record.write_text(str(time.time()))
        os.kill(os.getpid(), self.kill.number)


def train(model: Path, output: Path, trigger: Trigger, ranks: int) -> None:
    """`STEPS` steps from the newest checkpoint in `output` on, with a save and a validation every second one."""
    trigger.at("import")
    import lightning as L
    from torch import Tensor

    from helpers.training import BATCHES, ByStep, make_strategy, tokens
    from lowrank_dist import AdapterCheckpoint

    class Module(ByStep):
        def configure_model(self) -> None:
            super().configure_model()
            trigger.at("walk")

        def configure_optimizers(self) -> Any:
            trigger.at("engine")
            return super().configure_optimizers()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            trigger.at("training")
            return super().training_step(batch, index)

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            trigger.at("validation")
            super().validation_step(batch, index)

    class SetUp(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            trigger.at("set-up")

    write = os.pwrite

    def pwrite(*arguments: Any) -> int:
        trigger.at("save")
        return write(*arguments)

    os.pwrite = pwrite
    checkpoint = AdapterCheckpoint(output, filename="{step}", every_n_train_steps=2, save_top_k=1)
    trainer = L.Trainer(
        strategy=make_strategy(model),
        accelerator="cpu",
        devices=ranks,
        max_steps=STEPS,
        val_check_interval=2,
        limit_val_batches=2,
        callbacks=[SetUp(), checkpoint],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(tokens(BATCHES).flatten(0, 1)), batch_size=12 // ranks)
    trigger.at("rendezvous")
    trainer.fit(Module(model, output.with_suffix(".losses")), loader, loader, ckpt_path="last")


def train_rank(argv: Sequence[str]) -> int:
    """`train` as one of several processes: ``MODEL OUTPUT KILL RECORD RANKS``; KILL is JSON."""
    model, output, kill, record, ranks = argv
    # a shell that starts this in the background has SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    wanted = json.loads(kill)
    trigger = Trigger(None if wanted is None else Kill(**wanted), rank, Path(record))
    train(Path(model), Path(output), trigger, int(ranks))
    return 0


def arguments(model: Path, output: Path, kill: Kill | None, ranks: int) -> list[str]:
    """Those of `train_rank`."""
    record = output.with_suffix(".killed")
    record.unlink(missing_ok=True)
    return [str(model), str(output), json.dumps(kill and asdict(kill)), str(record), str(ranks)]


# -- attempts ---------------------------------------------------------------------------------------------------------


class Forked:
    """Ranks without a launcher that would end them: each forks from a server that has imported everything."""

    def __init__(self, argv: list[str], ranks: int, log: Path) -> None:
        self.store = meeting_place()
        environments = [environment_of(rank, ranks, self.store.port) for rank in range(ranks)]
        self.processes = [CONTEXT.Process(target=_forked, args=(argv, one, log), daemon=False) for one in environments]
        for process in self.processes:
            process.start()

    def alive(self) -> list[int]:
        return [process.pid or 0 for process in self.processes if process.is_alive()]

    def status(self) -> int:
        return max(abs(process.exitcode or 0) for process in self.processes)


def _forked(argv: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    train_rank(argv)


class Started:
    """Interpreters that torchrun or Lightning starts, in a session of their own."""

    def __init__(self, launcher: str, argv: list[str], ranks: int, log: Path) -> None:
        command = [sys.executable, __file__, "--rank", *argv]
        if launcher == "torchrun":
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def alive(self) -> list[int]:
        self.process.poll()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def status(self) -> int:
        return self.process.wait()


def attempt(
    model: Path, output: Path, kill: Kill | None, launcher: str | None, ranks: int = 2, within: float = WITHIN
) -> dict[str, Any]:
    """One attempt: seconds from the signal to the end of the last process, the survivors, the exit status."""
    argv, log = arguments(model, output, kill, ranks), output.with_suffix(".log")
    run = Forked(argv, ranks, log) if launcher is None else Started(launcher, argv, ranks, log)
    began, record = time.time(), Path(argv[3])
    while (alive := run.alive()) and time.time() - began < 300:
        if record.exists() and time.time() - os.stat(record).st_mtime > 2 * within:
            break
        time.sleep(0.1)
    seconds = time.time() - os.stat(record).st_mtime if record.exists() else None
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return {"status": run.status(), "seconds": seconds, "survivors": len(alive)}


def last_step(output: Path) -> int:
    from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint

    newest = newest_checkpoint(output)
    return 0 if newest is None else int(TrainingCheckpoint(newest).manifest["step"])


# -- the loop ---------------------------------------------------------------------------------------------------------


def draw(rng: random.Random, ranks: int) -> tuple[Kill, str | None]:
    """A moment, a signal, a rank, and what starts the ranks."""
    moment = rng.choice(MOMENTS)
    often = {"training": 3, "validation": 2, "save": 12}.get(moment, 1)
    kill = Kill(
        moment=moment,
        number=rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
        victim=rng.randrange(ranks),
        occurrence=rng.randint(1, often),
        delay=rng.choice((0.0, 0.5 * rng.random())),
    )
    # nothing but a launcher knows of a rank that has not come to the meeting yet
    alone = moment not in ("import", "rendezvous") and rng.random() < 0.7
    return kill, None if alone else rng.choice(LAUNCHERS)


def faults(one: dict[str, Any], within: float) -> list[str]:
    """What is wrong with an attempt whose ranks should all have ended `within` seconds."""
    if one["seconds"] is None:  # the run was over before the moment came
        return []
    wrong = []
    if one["survivors"] or one["seconds"] > within:
        wrong.append("ranks were left")
    if one["to"] < one["from"]:
        wrong.append("a checkpoint was lost")
    if one["moment"] == "training" and one["number"] == signal.SIGTERM and one["to"] <= one["from"]:
        wrong.append("SIGTERM in training saved nothing")
    return [f"{text}: {one}" for text in wrong]


def main() -> int:
    from helpers.models import save_checkpoint
    from helpers.training import recorded

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--within", type=float, default=WITHIN, help="seconds; more where other work runs beside it")
    options = parser.parse_args()
    rng, ranks = random.Random(options.seed), options.ranks
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = save_checkpoint(root / "model", "llama", tie_word_embeddings=True)
        attempt(model, root / "undisturbed", None, None, ranks)
        expected = recorded(root / "undisturbed.losses")
        failures: list[str] = []
        seconds: list[float] = []
        while len(seconds) < options.kills and not failures:
            output = root / f"chain{len(seconds)}"
            while len(seconds) < options.kills and last_step(output) < STEPS and not failures:
                kill, launcher = draw(rng, ranks)
                before = last_step(output)
                found = attempt(model, output, kill, launcher, ranks, options.within)
                one = {**asdict(kill), "launcher": launcher, **found, "from": before, "to": last_step(output)}
                print(json.dumps(one), flush=True)
                failures += faults(one, options.within)
                seconds += [] if one["seconds"] is None else [one["seconds"]]
            end = attempt(model, output, None, None, ranks)
            losses = recorded(output.with_suffix(".losses"))
            wrong = {step for step in expected if abs(losses.get(step, 0) - expected[step]) > 1e-4}
            left = sorted(path.name for path in output.iterdir())
            if end["status"] != 0 or left != [f"step={STEPS}"] or wrong:  # save_top_k=1
                failures.append(f"not resumed: {end}, {left}, wrong losses: {wrong}")
            if failures:
                print(output.with_suffix(".log").read_text()[-8000:])
    worst, median = max(seconds), sorted(seconds)[len(seconds) // 2]
    print(f"{len(seconds)} kills: all ranks had ended after {worst:.1f} s at most, {median:.1f} s in the middle")
    print("\n".join(failures) or "nothing lost, nothing wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(train_rank(sys.argv[2:]))
    sys.exit(main())

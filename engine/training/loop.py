"""A run from its configuration to its exports: stages one after the other, resumed wherever it stopped."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cohobate import config as configuration
from cohobate.config import Config
from cohobate.errors import UserError
from cohobate.evaluation import evaluate, summary
from cohobate.training import checkpoints, distributed
from cohobate.training.checkpoints import Checkpoints
from cohobate.training.console import Console, duration
from cohobate.training.distributed import Ranks
from cohobate.training.environment import environment
from cohobate.training.feed import Feed
from cohobate.training.graphs import why_not
from cohobate.training.metrics import Board, Clock, JsonLines, Meter, trim_lines
from cohobate.training.reporter import Reporter
from cohobate.training.samples import write_retrieval, write_samples
from cohobate.training.signals import StopRequest
from cohobate.training.stages import Stage, StageManager, quantise_teacher, source_hashes
from cohobate.training.step import Step

WATCHED, WATCHED_CLIPS = 64, 16  # images, or clips, by which a collapse is noticed
SEARCHED_CLIPS = 500  # of the picture of nearest clips
CALIBRATED = 32  # images or clips that the scales of an fp8 teacher come from


class Stopped(Exception):
    """The run was asked to stop; its last checkpoint is written. ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with code {code}")
        self.code = code


def train(config: Config) -> tuple[Path | None, int]:
    """Carry out a run, on every rank that torchrun started.

    Returns:
        The run folder (None on other ranks than the first, or when the run was stopped) and the exit code: 0 when it
        is finished, 143 after SIGTERM and 130 after Ctrl-C, both with a checkpoint to go on from.

    Raises:
        UserError: a setting that cannot be, data that are not there, or a run folder that holds another run.
    """
    ranks = distributed.start(config.device)
    try:
        unit = "clips" if config.data.frames > 1 else "img"
        with Console(ranks.first, unit=unit) as console, StopRequest() as stop:
            run = Run(configuration.check(config), ranks, console, stop)
            try:
                run.go()
            except Stopped as stopped:
                console.say(f"stopped; go on with the same command (run={config.run})")
                return None, stopped.code
            finally:
                run.close()
        return (Path(config.run) if ranks.first else None), 0
    finally:
        distributed.stop(ranks)


class Run:
    """The state of a run: its place, its files, its loader. Made by :func:`train`."""

    def __init__(self, config: Config, ranks: Ranks, console: Console, stop: StopRequest) -> None:
        self.config, self.ranks, self.console, self.stop = config, ranks, console, stop
        self.folder = Path(config.run)
        self.begin = time.perf_counter()
        _check_device(config, ranks)
        self.clock = Clock(ranks.device)
        self.meter = Meter()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep, ranks)
        point = self._resume_point()
        self.feed = Feed(config, ranks)
        self.manager = StageManager(config, ranks, self.folder, self.feed.batches_per_epoch)
        self.identity = {
            "fingerprint": configuration.fingerprint(config, self.feed.train.hash, ranks.world),
            "config": configuration.bound(config),
            "data": self.feed.train.hash,
            "ranks": ranks.world,
            "sources": source_hashes(config),
        }
        self.progress = self._verified(point) if point is not None else {"stage": 0, "stage_step": 0, "step": 0}
        self.point = point
        self.timing: dict[str, dict[str, float]] = {}
        self.train_images, self.test_images = self.feed.sources()
        self._watched: Tensor | None = None
        self._said: set[str | None] = {None}
        if ranks.first:
            self._open_files()
        distributed.barrier(ranks)

    # -- the run -------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Every stage from where the run stands."""
        done = self.progress
        self.clock.mark("setup")
        if done.get("finished"):
            self.console.say(f"{self.folder} is finished; give another run=... to train again")
            return
        self.feed.open(self._taken(done["stage"], done["stage_step"]))
        self._say_what_comes()
        if self.point is None:
            self._evaluate_untrained()
        else:
            self.console.say(f"resumed from {self.point} after update {done['step']}")
        self._note_time("0 start")
        before: Stage | None = None
        for index in range(done["stage"], len(self.config.stages)):
            stage = self.manager.enter(index, before)
            if self.point is not None and index == done["stage"]:
                self._restore(stage, self.point)
            before = self._train_stage(stage)
        self.checkpoints.finish()
        self.console.say(f"finished in {duration(time.perf_counter() - self.begin)}")

    def _say_what_comes(self) -> None:
        data, ranks, accumulate = self.config.data, self.ranks.world, self.config.optimizer.accumulate
        images = data.batch_size * accumulate * ranks
        where = str(self.ranks.device) + (f", {ranks} ranks" if self.ranks.many else "")
        self.console.say(
            f"{self.folder}: {len(self.feed.train)} {self.feed.train.UNIT}s, {images} an update, "
            f"{self.feed.batches_per_epoch // accumulate} updates an epoch, on {where}, loader {self.feed.loader.name}"
        )
        for index, stage in enumerate(self.config.stages):
            schedule = self.manager.schedule(index)
            named = stage.teacher.spec if stage.teacher.source == "model" else stage.teacher.source
            source = "" if stage.method == "mae" else f", teacher {named}"
            self.console.say(
                f"stage {index + 1} {stage.name}: {stage.method}{source}, {schedule.steps} updates, "
                f"peak rate {schedule.peak:.2e}"
            )

    def _taken(self, index: int, updates: int = 0) -> int:
        """Micro-batches of a rank in the stages before ``index`` and in its first ``updates``."""
        counts = [configuration.for_stage(self.config, number).optimizer.accumulate for number in range(index + 1)]
        before = sum(steps * count for steps, count in zip(self.manager.steps, counts[:-1], strict=False))
        return before + updates * counts[-1]

    def _train_stage(self, stage: Stage) -> Stage:
        if self.progress["stage"] != stage.index:
            self.progress = {"stage": stage.index, "stage_step": 0, "step": self.progress["step"]}
        self._quantise(stage)
        step = Step(stage, self.ranks, self.clock, self.meter, self.feed.next)
        self._say_why_no_graph(stage)
        images = self._watched_images()
        reporter = Reporter(self.ranks, self.clock, self.meter, stage, self.progress["stage_step"], images)
        self.clock.mark("setup")
        every, saved, asked, alarmed = self.config.log.every, time.monotonic(), False, False
        for number in range(self.progress["stage_step"], stage.steps):
            last = number + 1 == stage.steps
            reads = (number + 1) % every == 0 or last
            step(number, signals=reads)
            self.progress["stage_step"] += 1
            self.progress["step"] += 1
            asked, due = self.stop.code != 0, self._time_is_up(saved)
            if self.ranks.many and not reads:
                asked = due = False  # ranks speak to each other only where the metrics are read
            if reads:
                row, asked, due = reporter.read(number + 1, asked, due)
                if "alarm" in row and not alarmed:
                    alarmed = True
                    self.console.say(f"stage {stage.index + 1} {stage.name}, update {number + 1}: {row['alarm']}")
                self._log(stage, reporter, row)
            if asked or last or due or self._is_checkpoint_step(number + 1):
                self._save(stage)
                saved = time.monotonic()
            if asked:
                raise Stopped(self.stop.code or 143)
        step.close()
        self._finish_stage(stage)
        return stage

    def _quantise(self, stage: Stage) -> None:
        """Give a stage its fp8 teacher: calibrated on the stage's first batch, so a resumed run gets the same one.

        A teacher that fails the gate stays as it is, and the run says so: it may have trained for days to get here.
        """
        if self.config.precision.teacher != "fp8" or stage.teacher is None:
            return
        batch, epoch = self.feed.glance(self._taken(stage.index))
        plan = stage.plan(batch.sample_ids[:CALIBRATED], epoch, masks=1)
        title = f"stage {stage.index + 1} {stage.name}"
        try:
            report = quantise_teacher(stage, batch.pixels[:CALIBRATED], plan)
        except UserError as error:
            self.console.say(f"{title}: the teacher stays in bf16: {error}")
            return
        if self.ranks.first:
            name = f"teacher-fp8-{stage.index + 1}.json"
            self._write_json(name, report.rows())
            worst = min(report.features.values(), key=lambda each: each.cosine)
            self.console.say(
                f"{title}: teacher in fp8 in {report.quantised} of {len(report.blocks)} blocks; "
                f"features against bf16: {worst}; {name}"
            )

    def _say_why_no_graph(self, stage: Stage) -> None:
        """Once a run: why a GPU replays no graph of the whole step."""
        reason = why_not(stage.config, self.ranks)
        if self.config.execution.cuda_graph == "auto" and self.ranks.device.type == "cuda" and reason not in self._said:
            self._said.add(reason)
            self.console.say(f"execution.cuda_graph: off, for {reason}")

    def _watched_images(self) -> Tensor | None:
        """Images or clips from the whole range of the held-out part, by which the first rank watches for a collapse."""
        source = self.test_images or self.train_images
        if not self.ranks.first:
            return None
        if self._watched is None:
            count = WATCHED if self.config.data.frames == 1 else WATCHED_CLIPS
            few = dataclasses.replace(source, limit=count, batch_size=count, loader="torch", workers=0, _cache=[])
            self._watched = next(pixels for pixels, _ in few.batches(torch.device("cpu")))
        return self._watched.to(self.ranks.device)

    def _time_is_up(self, saved: float) -> bool:
        settings = self.config.checkpoint
        return settings.every_steps is None and time.monotonic() - saved >= 60 * settings.every_minutes

    def _is_checkpoint_step(self, stage_step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and stage_step % every == 0

    def _log(self, stage: Stage, reporter: Reporter, row: dict[str, Any]) -> None:
        step = self.progress["step"]
        taken = self._taken(stage.index, self.progress["stage_step"])
        epoch = round(taken / self.feed.batches_per_epoch, 4)
        line = {"step": step, "stage": stage.index + 1, "epoch": epoch} | row
        if self.ranks.first:
            self.lines.write(line)
            self.board.write(step, line)
            total = len(self.manager.steps)
            left = sum(self.manager.steps[stage.index :]) - self.progress["stage_step"]
            self.console.progress(
                line,
                stage=f"stage {stage.index + 1}/{total} {stage.name}",
                step=self.progress["stage_step"],
                steps=stage.steps,
                remaining=reporter.pace * left,
            )
        self.clock.mark("log")

    def _finish_stage(self, stage: Stage) -> None:
        """Export, evaluate, draw: all of it may be done again if the run dies in the middle."""
        folder = self.manager.leave(stage, self.progress["step"])
        if self.ranks.first:
            self.console.say(f"stage {stage.index + 1} {stage.name}: exported to {folder}")
            images, ids = self.feed.samples(self.config.evaluate.samples)
            path = self.folder / f"samples-{stage.index + 1}.npz"
            write_samples(path, stage, images, ids)
            self._draw_retrieval(stage)
            self.clock.mark("report")
            self._evaluate(stage.method.student, stage.index + 1, stage.name)
            self._write_json("data_report.json", self.feed.report())
        distributed.barrier(self.ranks)
        self._note_time(f"{stage.index + 1} {stage.name}")

    def _draw_retrieval(self, stage: Stage) -> None:
        """Nearest images or clips by the stage's features; a picture costs no run."""
        if not self.config.evaluate.enabled:
            return
        file, memory = self.folder / f"retrieval-{stage.index + 1}.npz", self.train_images
        if self.config.data.frames > 1:  # all that are searched are held at once
            memory = dataclasses.replace(memory, limit=SEARCHED_CLIPS, _cache=[])
        try:
            write_retrieval(file, stage, memory, self.test_images, device=self.ranks.device)
        except UserError as error:
            self.console.say(f"stage {stage.index + 1} {stage.name}: no picture of what lies nearest: {error}")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate_untrained(self) -> None:
        if self.ranks.first and self.config.evaluate.enabled:
            self._evaluate(self.manager.initial_student(0).to(self.ranks.device), 0, "untrained")
        distributed.barrier(self.ranks)

    def _evaluate(self, student: torch.nn.Module, stage: int, name: str) -> None:
        settings = self.config.evaluate
        if not settings.enabled:
            return
        metrics = tuple(metric for metric in ("knn", "linear") if getattr(settings, metric))
        begin = time.perf_counter()
        try:
            rows = evaluate(
                student,  # type: ignore[arg-type]
                self.train_images,
                self.test_images,
                metrics=metrics,
                k=settings.k,
                temperature=settings.temperature,
            )
        except UserError as error:  # labels or features that will not do cost the evaluation, not the run
            self.console.say(f"stage {stage} {name}: not evaluated: {error}")
            return
        update = self.progress["step"]
        place = {"step": update, "stage": stage, "stage_name": name}
        trim_lines(self.folder / "evaluations.jsonl", lambda row: row["stage"] < stage)
        with JsonLines(self.folder / "evaluations.jsonl") as file:
            file.write(*[place | row for row in rows])
        for row in rows:
            self.board.write(update, {f"eval/{row['features']}/{row['label']}/{row['metric']}": row["value"]})
        spent = duration(time.perf_counter() - begin)
        self.console.say(f"stage {stage} {name}: evaluated in {spent}")
        for line in summary(rows):
            self.console.say(f"  {line}")
        self.clock.mark("evaluation")

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _resume_point(self) -> Path | None:
        wish = self.config.resume
        if wish == "auto":
            return self.checkpoints.last()
        if wish == "never":
            if (self.folder / "metrics.jsonl").exists() or self.checkpoints.found():
                raise UserError(f"run: expected a new folder, for resume is never; {str(self.folder)!r} holds a run")
            return None
        checkpoints.read_progress(Path(wish))
        return Path(wish)

    def _verified(self, point: Path) -> dict[str, int]:
        """The place of a resume point, if it belongs to this configuration, data set and number of ranks."""
        found = checkpoints.read_progress(point)
        if found["fingerprint"] == self.identity["fingerprint"] and found["sources"] == self.identity["sources"]:
            return {key: int(found.get(key, 0)) for key in ("stage", "stage_step", "step", "finished")}
        changes = _differences(found, self.identity)
        raise UserError(
            f"resume: expected the settings that {point} was made with, got {'; '.join(changes)} "
            "(give another run=..., or resume=never with a new folder)"
        )

    def _save(self, stage: Stage) -> None:
        state = checkpoints.training_state(stage.trained, stage.updater.optimizer)
        state["updater"] = stage.updater.counters()
        place = {key: self.progress[key] for key in ("stage", "stage_step", "step")}
        self.checkpoints.save(self.progress["step"], state, place | self.identity | {"teacher": stage.teacher})
        self.clock.mark("checkpoint")

    def _restore(self, stage: Stage, point: Path) -> None:
        expected = checkpoints.read_progress(point).get("teacher")
        # With the published unsynchronised reset every rank may have drawn another one; the first rank's is noted.
        mine = self.ranks.first or not self.config.compat.unsynchronised_reset
        if mine and stage.teacher != expected:
            raise UserError(
                f"resume: stages.{stage.index} ({stage.name}): expected the teacher {expected} that {point} was made "
                f"with, got {stage.teacher}: its weights have changed"
            )
        state = checkpoints.training_state(stage.trained, stage.updater.optimizer)
        state["updater"] = stage.updater.counters()
        checkpoints.load(point, state, self.ranks)
        checkpoints.restore_optimizer(stage.trained, stage.updater.optimizer, state)
        stage.updater.write_shadows()

    # -- files ---------------------------------------------------------------------------------------------------------

    def _open_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(configuration.dump(self.config), encoding="utf-8")
        self._write_json("environment.json", self._environment())
        metrics = self.folder / "metrics.jsonl"
        if self.point is not None:
            for path in (metrics, self.folder / "evaluations.jsonl"):
                trim_lines(path, lambda row: row["step"] <= self.progress["step"])
            timing = self.folder / "timing.json"
            self.timing = json.loads(timing.read_text(encoding="utf-8")) if timing.is_file() else {}
        else:
            for path in (metrics, self.folder / "evaluations.jsonl"):
                path.unlink(missing_ok=True)
        self.lines = JsonLines(metrics)
        self.board = Board(self.folder / "tensorboard", self.config.log.tensorboard)

    def _environment(self) -> dict[str, Any]:
        """For ``environment.json``; says so where a resumed run decodes its videos in other colours than before."""
        found, file = environment(self.ranks, self.feed.train), self.folder / "environment.json"
        if self.point is not None and file.is_file():
            before = json.loads(file.read_text(encoding="utf-8")).get("video_decoder")
            if before != found.get("video_decoder"):
                self.console.say(f"videos were decoded by {before}, from here on by {found.get('video_decoder')}")
        return found

    def _write_json(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def _note_time(self, name: str) -> None:
        """Add the seconds since the last call to ``timing.json`` under ``name``."""
        spent = self.clock.take()
        entry = self.timing.setdefault(name, {})
        for activity, seconds in spent.items():
            entry[activity] = round(entry.get(activity, 0.0) + seconds, 3)
        if self.ranks.first:
            self._write_json("timing.json", self.timing)

    def close(self) -> None:
        """Release files and workers; safe to call at any point."""
        self.feed.close()
        if self.ranks.first:
            self.lines.close()
            self.board.close()


def _check_device(config: Config, ranks: Ranks) -> None:
    """Raise a UserError for what is asked for by name and these ranks cannot do."""
    kind = ranks.device.type
    if config.precision.teacher == "fp8" and kind != "cuda":
        raise UserError(f"precision.teacher: expected bf16 or fp32, for the device is {kind}, got fp8")
    for index in range(len(config.stages)):
        reason = why_not(configuration.for_stage(config, index), ranks)
        if config.execution.cuda_graph == "on" and reason is not None:
            raise UserError(f"execution.cuda_graph: expected auto or off, for {reason}, got on")


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What changed between a resume point and this run, in words."""
    old, new = found["config"], json.loads(json.dumps(wanted["config"]))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changes = [f"{key}={new.get(key)} instead of {old.get(key)}" for key in keys]
    for name in ("data", "ranks", "sources"):
        if found[name] != wanted[name]:
            changes.append(f"{name} {wanted[name]} instead of {found[name]}")
    return changes

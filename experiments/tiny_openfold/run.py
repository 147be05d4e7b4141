"""A run: the loop, its snapshots, and what comes out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from evoplan.cost_model.devices import Device
from evoplan.experiments.tiny_openfold import output
from evoplan.experiments.tiny_openfold.memory import Memory, measure_parts, measure_peak, predict
from evoplan.experiments.tiny_openfold.options import SUMMARY, Options, ProfilerConfig
from evoplan.experiments.tiny_openfold.profiling import StepProfiler
from evoplan.experiments.tiny_openfold.training import WARMUP_STEPS, StepResult, TinyTraining
from evoplan.planner.errors import CommonError, RunError
from evoplan.planner.files import write_json
from evoplan.planner.plans.plan import Plan
from evoplan.planner.runs.snapshots import Snapshots


class Run:
    """Steps are numbered from the first of warm-up, as batches are.

    Args:
        plan: that is in force, if any.
        device: what the memory is predicted for.

    Attributes:
        losses: of the timed steps, those before a snapshot included.
        results: of the timed steps since the start of this process.
        peaks: bytes; on a CPU of the one step that is measured.
        memory: of that step, predicted and measured, where it was asked for.
    """

    def __init__(
        self,
        training: TinyTraining,
        plan: Plan | None,
        device: Device,
        options: Options,
        profiler: ProfilerConfig,
    ) -> None:
        self.training, self.plan, self.device = training, plan, device
        self.options, self.profiler, self.world = options, profiler, training.world
        self.say = output.printer(self.world)
        self.losses: list[float] = []
        self.results: list[StepResult] = []
        self.peaks: list[int] = []
        self.memory: dict[str, Memory] = {}
        self.first, self.last = 0, WARMUP_STEPS + options.num_steps

    def go(self) -> None:
        """All of it.

        Raises:
            CommonError: a snapshot stands in the way, or fits nothing.
            RunError: the loss is no number.
        """
        output.print_setup(self.training, self.options.num_steps, self.profiler, self.plan, self.say)
        snapshots = self._snapshots()
        with nullcontext() if snapshots is None else closing(snapshots):
            self._train(snapshots)
        self.say("\nTraining completed successfully!")

    def _train(self, snapshots: Snapshots | None) -> None:
        """The steps, from the newest snapshot on, and what is written at the end."""
        if snapshots is not None:
            self._go_on(snapshots)
        if self.first < WARMUP_STEPS:
            self.say(f"\nRunning {WARMUP_STEPS} warmup steps...")
        with ExitStack() as stack:
            advance = self._progress_bar(stack)
            # Once the optimizer has its states, and best before the timed steps.
            measured_at = min(max(self.first, WARMUP_STEPS - 1), self.last - 1)
            profiler: StepProfiler | None = None
            for number in range(self.first, self.last):
                if number == WARMUP_STEPS:
                    self.say("Warmup complete. Starting measured training loop...")
                if number == max(self.first, WARMUP_STEPS):
                    self.say(output.RULE)
                if number > max(measured_at, WARMUP_STEPS - 1) and profiler is None:
                    profiler = StepProfiler(self.profiler, self.training.device.type, self.world.rank)
                    stack.enter_context(profiler)
                result = (self._measured_step if number == measured_at else self._step)(number)
                self._record(number, result)
                if profiler is not None:
                    profiler.step()
                if snapshots is not None and self._is_due(number):
                    self._save(snapshots, number + 1)
                advance()
        self._report()
        if snapshots is not None:  # after the summary: a run that is killed here has it, or does this again
            self._save(snapshots, self.last)

    def _save(self, snapshots: Snapshots, steps: int) -> None:
        notes = {"losses": self.losses, "scaler": self.training.scaler.state_dict()}
        snapshots.save(steps, self.training, notes)

    def _step(self, number: int) -> StepResult:
        """A step, and on a GPU its peak."""
        on_gpu = self.training.device.type == "cuda"
        batch = self.training.batch(number)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = self.training.step(batch)
        if on_gpu:
            self.peaks.append(torch.cuda.max_memory_allocated())
        return result

    def _measured_step(self, number: int) -> StepResult:
        """A step whose peak is measured; with memory profiling also what it is made of."""
        peak, result = measure_peak(self.training, number)
        self.peaks.append(peak)
        if self.profiler.enable_memory_profiling and not self.training.compiled:
            self.memory = {
                "predicted": predict(self.training.recipe, self.device, self.plan, self.world.replicas),
                "measured": measure_parts(self.training, number, peak, self.device),
            }
        return result

    def _record(self, number: int, result: StepResult) -> None:
        """Check a step's loss; keep what a timed step gave, and print every tenth."""
        losses = self.world.gathered(torch.tensor([result.loss], dtype=torch.float64)).flatten()
        if not losses.isfinite().all():
            raise RunError(
                f"the loss of step {number + 1} is {float(losses.sum())}; try a smaller --learning-rate"
            )
        step, batch = number - WARMUP_STEPS, self.training.recipe.shape.batch
        if step < 0:
            return
        self.losses.append(float(losses.mean()))
        self.results.append(result)
        if step % 10 == 0:
            steps = self.options.num_steps
            self.say(output.step_line(step, steps, self.losses[-1], result, batch, self.peaks[-1]))

    def _is_due(self, number: int) -> bool:
        """Whether a snapshot is to be written after a step that is not the last."""
        step, every = number + 1 - WARMUP_STEPS, self.options.save_every
        return every is not None and step > 0 and step % every == 0 and number + 1 < self.last

    def _snapshots(self) -> Snapshots | None:
        """Where snapshots go, if anywhere."""
        if self.options.save_every is None:
            return None
        return Snapshots(self.options.snapshots, asdict(self.training.recipe), self.world)

    def _go_on(self, snapshots: Snapshots) -> None:
        """Go on from the newest snapshot, where that is asked for."""
        options, folder = self.options, self.options.snapshots
        newest = snapshots.newest()
        held = f"{folder} holds a snapshot of step {newest - WARMUP_STEPS}"
        if newest and not options.resume:
            raise CommonError(f"{held}; add --resume, or name another folder with --snapshots")
        if newest >= self.last:
            raise CommonError(f"{held}; to go on give more --num-steps")
        if newest:
            notes = snapshots.load(newest, self.training)
            if not isinstance(notes, dict) or not notes.keys() >= {"losses", "scaler"}:
                raise CommonError(f"{folder}: its snapshots are of another program; name another folder")
            self.losses += notes["losses"]
            self.training.scaler.load_state_dict(notes["scaler"])
            self.first = newest
            self.say(f"\nResumed after step {newest - WARMUP_STEPS}")
        elif options.resume:
            self.say(f"\nNo snapshot in {folder} yet: from the start")

    def _progress_bar(self, stack: ExitStack) -> Callable[[], None]:
        """Progress on a terminal; nothing where output goes to a file."""
        if not (self.world.first and sys.stderr.isatty()):
            return lambda: None
        bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = bar.add_task("training", total=self.last - self.first)
        return lambda: bar.advance(task)

    def _report(self) -> None:
        """Print and write what came out."""
        training, profiler, steps = self.training, self.profiler, self.options.num_steps
        summary = output.summary_of(self.losses, self.results, training.recipe.shape.batch, self.peaks)
        output.print_summary(summary, self.say)
        if training.compiled and profiler.enable_memory_profiling:
            self.say("\nCompiled code has no regions: the peak cannot be split, nor predicted.")
        if self.memory:
            output.print_memory(self.memory["predicted"], self.memory["measured"], self.say)
        if self.world.first and self.options.validate_setup:
            self.say("Validation successful! Environment ready.")
        elif self.world.first:
            path = Path(profiler.profile_dir) / SUMMARY
            write_json(path, output.document(training, steps, profiler, summary, self.losses, self.memory))
            self.say(f"\nPerformance data saved to: {path}")
            if profiler.enabled:
                self.say(f"PyTorch profiling data saved to: {profiler.profile_dir}")
                self.say(f"   Launch TensorBoard: tensorboard --logdir {profiler.profile_dir}")

"""`make mutants`: deliberate faults, each of which must turn a test near to it red.

    python -m tests.mutants [--all] [NAME ...]

Each is put into a copy of the tree. Those that survive are named, and the exit code is 1. With --all the
whole suite runs against each, not the nearest tests alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import click

ROOT = Path(__file__).parents[1]
COPIES = 2  # tried at the same time
SECONDS = 900  # for the nearest tests of one


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file, find, put: the text that is found there once, and what stands in its place.
        why: what is wrong then.
        tests: files or tests of which one must fail, without the leading `tests/test_`.
    """

    name: str
    file: str
    find: str
    put: str
    why: str
    tests: tuple[str, ...]


MUTANTS = [
    # --- planner: replay, dynamic program, liveness ------------------------------------------
    Mutant(
        "replay-redo-gradients",
        "planner/schedules/replay.py",
        "self.table.gradient_bytes(body.span.stop) if redo else 0",
        'self.table.gradient_bytes(body.span.stop) - self.table.state_bytes.get("e", 0) * any('
        'v.tensor == "e" for v in self.table.liveness.alive(body.span.stop)) if redo else 0',
        "a redo forgets the gradient of the extra stack's tensor, which is live there",
        ("replay.py",),
    ),
    Mutant(
        "holdings-preserved",
        "planner/schedules/holdings.py",
        "begun[moment.step] = at + 1",
        "begun[moment.step] = at + 2",
        "what a step keeps is called workspace for one moment",
        ("holdings.py",),
    ),
    Mutant(
        "snapshot-workspace",
        "planner/pages/snapshot.py",
        "if at and workspace[at - 1]:\n                self._free",
        "if at and workspace[at - 1] and at < len(workspace):\n                self._free",
        "the last step's workspace is never freed in a snapshot",
        ("reports.py",),
    ),
    Mutant(
        "page-script",
        "planner/pages/page.py",
        'data=text.replace("<", ',
        'data=text.replace("<<", ',
        "a name in a plan file ends the script that it stands in",
        ("reports.py",),
    ),
    Mutant(
        "page-labels",
        "planner/pages/svg.py",
        "if frame.holds(box) and not any(box.meets(other) for other in used):",
        "if frame.holds(box):",
        "labels lie on each other",
        ("reports.py",),
    ),
    Mutant(
        "replay-keeps-twice",
        "planner/schedules/replay.py",
        "if self.holders[version] == 1 and self.table.liveness.owns(version):",
        "if self.table.liveness.owns(version):",
        "a version counts once for everybody who holds it",
        ("replay.py",),
    ),
    Mutant(
        "replay-entry-released",
        "planner/schedules/replay.py",
        "            self.release(state.values())\n            self.release(record.entry)\n",
        "            self.release(state.values())\n",
        "a checkpoint's entry is held for ever",
        ("replay.py",),
    ),
    Mutant(
        "dp-loss",
        "planner/solvers/dp.py",
        "done[self.costs.units(self.table.loss_bytes) :] = 0.0",
        "done[:] = 0.0",
        "the loss needs no memory",
        ("dp.py",),
    ),
    Mutant(
        "dp-last-checkpoint",
        "planner/solvers/dp.py",
        "range(at + 1, stop if ends else stop + 1)",
        "range(at + 1, stop)",
        "no checkpoint ends with its group",
        ("dp.py",),
    ),
    Mutant(
        "dp-need",
        "planner/solvers/dp.py",
        "        if memory < self.need:\n            return np.inf\n",
        "",
        "a choice is looked up below what it needs",
        ("dp.py", "bounds.py"),
    ),
    Mutant(
        "dp-rise",
        "planner/solvers/segments.py",
        "behind -= np.where(first, 0.0, self._rise(best))",
        "behind -= 0.0",
        "an end that was behind stays behind however late the best has become",
        ("dp.py",),
    ),
    Mutant(
        "dp-shifted-rows",
        "planner/solvers/tables.py",
        "self._lead - shift + first * BLOCK, self._padded.shape[1] - shift",
        "self._lead + first * BLOCK, self._padded.shape[1]",
        "rows are compared at another memory than they are seen with",
        ("dp.py",),
    ),
    Mutant(
        "frontier-forgets-rounding",
        "planner/solvers/frontier.py",
        "-(-self.spans[index] // unit) + rounded",
        "-(-self.spans[index] // unit)",
        "a finer grid is left out by what a coarser one would find if it rounded nothing",
        ("frontier.py::test_grids_that_are_not_solved_have_no_answer",),
    ),
    Mutant(
        "dp-way-through",
        "planner/solvers/segments.py",
        "passing -= self._rise(best)",
        "passing -= 0.0",
        "a way through that was behind stays behind however late the best has become",
        ("dp.py",),
    ),
    Mutant(
        "dp-enough",
        "planner/solvers/ways.py",
        "return Ways(wanted + most",
        "return Ways(wanted",
        "a way through a group is taken with less memory than its last parts need",
        ("dp.py",),
    ),
    Mutant(
        "grid-rounds-down",
        "planner/solvers/grid.py",
        "size_bytes // self.unit_bytes if self.optimistic else -(-size_bytes // self.unit_bytes)",
        "size_bytes // self.unit_bytes",
        "costs are rounded down to the grid, and schedules exceed their budget",
        ("dp.py",),
    ),
    Mutant(
        "liveness-outputs",
        "cost_model/liveness.py",
        "range(version.maker + 1, last + 1)",
        "range(version.maker + 1, last + (last < self.end))",
        "outputs are dropped before the end",
        ("liveness.py", "replay.py"),
    ),
    Mutant(
        "liveness-entry",
        "cost_model/liveness.py",
        "version for version in read if version.maker < span.start",
        "version for version in read if version.maker != span.start",
        "a checkpoint keeps what its own steps make",
        ("liveness.py", "replay.py"),
    ),
    # --- model: pieces and their backward ----------------------------------------------------
    Mutant(
        "chunk-context-gradient",
        "model/running/kinds/chunk.py",
        "        context_grad = add(context_grad, one_piece(span))\n",
        "        context_grad = one_piece(span)\n",
        "the context's gradient is the last chunk's alone",
        ("execution.py",),
    ),
    Mutant(
        "chunk-dropout",
        "model/running/slices.py",
        'return cuts if submodule.dropout_shared_dim == dim else {**cuts, "dropout": dim}',
        "return cuts",
        "every chunk gets the first one's dropout mask, or one that does not fit",
        ("execution.py", "apply.py"),
    ),
    Mutant(
        "coshard-bias",
        "model/running/layers.py",
        "if layer.bias is None or part.start else",
        "if layer.bias is None else",
        "every co-shard adds the output bias",
        ("execution.py",),
    ),
    Mutant(
        "coshard-normalisation",
        "model/running/kinds/coshard.py",
        "            if (total := add(x_grads.get(name), grads[name])) is not None:\n",
        "            if (total := add(None, grads[name])) is not None:\n",
        "of several shares the last one's gradient counts",
        ("execution.py",),
    ),
    Mutant(
        "half-sums",
        "model/running/gradients.py",
        "term.float() if term.element_size() == 2 else term",
        "term",
        "gradients of pieces in half precision are summed in half precision",
        ("execution.py",),
    ),
    Mutant(
        "vjp-keeps-the-graph",
        "model/running/runs.py",
        "grads = gradients_of(self.edge, inputs, grad, keep)",
        "grads = gradients_of(self.edge, inputs, grad, False)",
        "a second backward finds nothing",
        ("loops.py::test_several_backwards",),
    ),
    Mutant(
        "vjp-accumulates-into-the-target",
        "model/running/gradients.py",
        "grad.clone(memory_format=torch.contiguous_format) if read else grad",
        "grad",
        "the gradient that backward was given is written over",
        ("execution.py", "loops.py::test_accumulation_and_clipping"),
    ),
    Mutant(
        "remake-context",
        "model/running/remake.py",
        "            with torch.no_grad(), self.context:\n",
        "            with torch.no_grad():\n",
        "what is cheap is made again in backward's precision",
        ("kernels.py::test_what_is_cheap_is_made_again_in_forwards_precision",),
    ),
    Mutant(
        "remake-changed",
        "model/running/remake.py",
        "if self.tensor._version != self.version:",
        "if False:",
        "a tensor that was written into is taken as it is",
        ("kernels.py::test_what_was_written_into_is_not_made_again_from",),
    ),
    Mutant(
        "dropout-one-mask",
        "model/running/dropout.py",
        "(seed + (step + 1) * _SPREAD) % 2**63",
        "(seed + _SPREAD) % 2**63",
        "all steps drop the same",
        ("execution.py",),
    ),
    Mutant(
        "dropout-scale",
        "model/running/dropout.py",
        ".div_(1.0 - rate)",
        "",
        "what is kept is not scaled up",
        ("execution.py",),
    ),
    Mutant(
        "mask-dtype",
        "model/modules/attention.py",
        "for each in (dtype, mask.dtype)",
        "for each in (mask.dtype,)",
        "the fill of a float32 mask is -inf in float16, and a row without keys is NaN",
        ("mixed.py::test_a_mask_of_any_dtype_is_finite_in_the_logits",),
    ),
    Mutant(
        "mask-pair-count",
        "model/modules/outer_product_mean.py",
        "return msa_mask.transpose(-1, -2) @ msa_mask",
        "return msa_mask.sum(-2)[..., None, :].expand(*msa_mask.shape[:-2], *msa_mask.shape[-1:] * 2)",
        "the mean is over the sequences that have one of two residues",
        ("oracle.py",),
    ),
    # --- cost model --------------------------------------------------------------------------
    Mutant(
        "mask-single",
        "model/modules/pairformer.py",
        "        logits += mask_bias(single_mask, logits.dtype)[..., None, None, :]\n",
        "",
        "tokens that are missing are attended to",
        ("oracle_3.py",),
    ),
    Mutant(
        "mask-pair-weights",
        "model/modules/pairformer.py",
        "        logits = logits + mask_bias(pair_mask, logits.dtype).unsqueeze(-3)\n",
        "",
        "pairs that are missing have weight",
        ("oracle_3.py",),
    ),
    Mutant(
        "layout-second-name",
        "model/modules/outer_product_mean.py",
        'self.along("row", "res")',
        'self.along("row")',
        "pieces of z's rows read all of m",
        ("execution.py",),
    ),
    Mutant(
        "ranks-whole-constant",
        "model/sharing/parallel.py",
        "constants[whole] if cut is None else",
        "self.ranks.own(constants[whole], -1) if cut is None else",
        "a rank attends to its own share of the keys",
        ("parallel.py",),
    ),
    Mutant(
        "families-last-m",
        "model/families/pairformer.py",
        "last_m=self.last_m or n_block < self.n_block",
        "last_m=self.last_m",
        "the first blocks of an MSA module lack what the plan has for them",
        ("families.py",),
    ),
    Mutant(
        "steps-settle",
        "planner/processes/world.py",
        "            work.wait()\n",
        "            pass\n",
        "a step ends before the threads that sum its gradients do",
        ("training.py",),
    ),
    Mutant(
        "calls-numbers",
        "cost_model/meta_calls.py",
        "    return type(value), value  #",
        "    return value  #",
        "1 and 1.0 make different dtypes",
        ("trace.py",),
    ),
    Mutant(
        "meta-calls-forget-values",
        "cost_model/meta_calls.py",
        "if value.constant is not None:",
        "if False:",
        "a fake tensor that has a value is made again without it",
        ("trace.py::test_fake_tensors_are_made_again_where_they_were",),
    ),
    Mutant(
        "meta-calls-resized",
        "cost_model/meta_calls.py",
        'if schema.name.endswith("_") and torch.Tag.pointwise in func.tags else None',
        'if schema.name.endswith("_") else None',
        "what resizes a tensor in place does so once",
        ("trace.py::test_what_is_written_in_place_is_worked_out_once",),
    ),
    Mutant(
        "profile-machine-s-speed",
        "planner/checking/profiling.py",
        "strategy: times[strategy].scaled(speed)",
        "strategy: times[strategy]",
        "what is timed later is compared with what a faster machine took",
        ("times.py::test_all_strategies_of_a_step_are_timed_side_by_side",),
    ),
    Mutant(
        "families-layout",
        "model/modules/triangle_attention.py",
        "self.transposes = transposed_bias and not self.starting",
        "self.transposes = not self.starting",
        "AlphaFold 3's ending node has the bias of AlphaFold 2's",
        ("oracle_3.py",),
    ),
    Mutant(
        "trace-freed",
        "cost_model/trace.py",
        "        self._known.discard(key)\n        del self._storages[key]\n",
        "        del self._storages[key]\n",
        "a new storage at the address of one that is gone does not count",
        ("trace.py", "scratch.py"),
    ),
    Mutant(
        "trace-statistics",
        "cost_model/results.py",
        "own = x.dtype.itemsize > 2 or (on_cpu and (weight is None or weight.dtype == x.dtype))",
        "own = True",
        "a normalisation's statistics are in half precision",
        ("mixed.py::test_peaks_are_as_planned",),
    ),
    Mutant(
        "results-reduced",
        "cost_model/results.py",
        "    if numel <= out.numel():",
        "    if True:",
        "a loss's result is as small as it looks",
        ("operators.py",),
    ),
    Mutant(
        "fit-shared-memory",
        "planner/fitting/ghosts.py",
        "there = None if made.beside is None else before[made.beside]",
        "there = None",
        "results that share memory count each for itself",
        ("fit_results.py::test_memory_of_results_that_share_it",),
    ),
    Mutant(
        "fit-kept-back",
        "model/foreign/obstacles.py",
        "if maker is not None and maker is not within.get(at) and storage not in returned[maker]:",
        "if False:",
        "what hooks keep of a block, for a loss to read, is cut off from the graph",
        ("fit_results.py::test_what_hooks_keep_and_a_loss_reads_is_refused",),
    ),
    Mutant(
        "scratch-one-thread",
        "cost_model/scratch.py",
        "return copied + 2 * threads * prod(normalized)",
        "return copied + 2 * prod(normalized)",
        "a normalisation's backward has rows of one thread only",
        ("scratch.py",),
    ),
    Mutant(
        "scratch-gaps",
        "cost_model/scratch.py",
        "if 1 not in factor.stride[-2:]",
        "if 1 not in factor.stride",
        "a factor with gaps is copied for nothing",
        ("scratch.py",),
    ),
    # --- executor, verification --------------------------------------------------------------
    Mutant(
        "tape-second-backward",
        "planner/execution/tape.py",
        "            self._kept = list(self._records) if keep else None\n",
        "            self._kept = self._records if keep else None\n",
        "a backward that keeps the graph uses its records up",
        ("loops.py::test_several_backwards",),
    ),
    Mutant(
        "tape-skips-what-has-no-gradient",
        "planner/execution/tape.py",
        "            elif top.first < step.index:\n                break\n",
        "            elif True:\n                break\n",
        "a loss on one output fails where another step's record lies on top",
        ("loops.py::test_a_loss_on_one_output", "loops.py::test_frozen_parameters", "changes.py"),
    ),
    Mutant(
        "tape-lets-go",
        "planner/execution/tape.py",
        "                top.kept.drop()\n",
        "                pass\n",
        "what autograd keeps of steps that no gradient reaches stays until the results go",
        ("in_graph.py::test_what_no_gradient_reaches_goes_when_backward_comes_past",),
    ),
    Mutant(
        "tape-lets-go-too-soon",
        "planner/execution/tape.py",
        "top.kept is not None and not keep:",
        "top.kept is not None:",
        "a backward that keeps the graph lets go of what a later loss needs",
        ("in_graph.py::test_one_loss_after_the_other",),
    ),
    Mutant(
        "keeping-circle",
        "model/running/remake.py",
        "        self._hooks = None  # it",
        "        # it",
        "what a step was given lives until somebody collects garbage",
        ("in_graph.py::test_nothing_outlives_the_results",),
    ),
    Mutant(
        "trace-written-gradients",
        "cost_model/steps.py",
        "    del others[step.target]\n",
        "",
        "the gradient of a step in autograd's own graph counts twice",
        ("in_graph.py::test_a_step_takes_what_was_traced",),
    ),
    Mutant(
        "tape-context",
        "planner/execution/submodules.py",
        "        with self.context:\n            self.chain.walk(steps, state, perform)",
        "        with nullcontext():\n            self.chain.walk(steps, state, perform)",
        "what runs again does so in backward's precision",
        ("mixed.py::test_what_runs_again_does_so_in_forwards_precision",),
    ),
    Mutant(
        "tape-random-state",
        "planner/execution/submodules.py",
        "with met.parameters.installed(), met.random or nullcontext():\n                kept,",
        "with met.parameters.installed():\n                kept,",
        "a layer that draws random numbers draws others when it runs again",
        ("changes.py",),
    ),
    Mutant(
        "fit-gradient-of-its-own",
        "model/foreign/leaves.py",
        "return Key(numbers_of(tensor), _source_of(tensor))",
        "return Key(numbers_of(tensor), None)",
        "a result with a gradient of its own is taken for another that shows the same numbers",
        ("fit_results.py::test_results_with_gradients_of_their_own",),
    ),
    Mutant(
        "fit-reads-more",
        "cost_model/children.py",
        "if watch.wants_more:",
        "if False:",
        "what a block reads and is not given has no gradient when it runs again",
        ("fit_results.py::test_what_is_read_and_wants_a_gradient_is_given",),
    ),
    Mutant(
        "fit-another-tensor",
        "model/foreign/calls.py",
        "if isinstance(argument, FromState) and numbers_of(leaf) != latest.get(argument.name):",
        "if False:",
        "a block that is given another tensor than it was planned for goes unnoticed",
        ("fit_loops.py::test_a_hook_on_a_block_that_changes_what_the_next_is_given",),
    ),
    Mutant(
        "fit-as-met",
        "planner/fitting/runs.py",
        "with met.attributes.installed(), other_buffers(module, met.buffers, met.others):",
        "with nullcontext():",
        "a normalisation counts what it sees twice, a block runs again in another mode",
        ("fit.py", "fit_loops.py"),
    ),
    Mutant(
        "fit-random-state",
        "planner/fitting/runs.py",
        "met.parameters.installed(), met.random or nullcontext():",
        "met.parameters.installed():",
        "a block that drops drops something else when it runs again",
        ("fit.py::test_gradients_are_the_models_own_under_any_schedule",),
    ),
    Mutant(
        "fit-autograd-as-met",
        "planner/fitting/runs.py",
        "with self.blocks[call.path].lock, self._as_met(call), met.parameters.installed(), met.context:",
        "with nullcontext():",
        "a block that autograd runs again finds other weights, modes and settings than forward did",
        ("fit_redone.py",),
    ),
    Mutant(
        "fit-loss-untold",
        "planner/fitting/simulating.py",
        "return max(table.loss_bytes, self.loss_peak_bytes - around - moments[at].held_bytes)",
        "return table.loss_bytes",
        "a state is kept for each block where the loss takes most",
        ("fit_around.py",),
    ),
    Mutant(
        "fit-does-not-repeat",
        "planner/fitting/runs.py",
        "if not alike(fingerprint(made), met.fingerprint):",
        "if False:",
        "a block that does something else when it runs again has a wrong gradient",
        ("fit_loops.py::test_what_would_do_otherwise_when_it_runs_again_is_an_error",),
    ),
    Mutant(
        "fit-module-does-not-repeat",
        "model/foreign/inside.py",
        "if self._made is not None and not alike(made, self._made):",
        "if False:",
        "a module that does something else when it runs again has a wrong gradient",
        ("fit_odd_modules.py::test_a_module_that_does_not_repeat_itself_is_an_error_and_no_gradient",),
    ),
    Mutant(
        "axes-near-only",
        "model/foreign/independence.py",
        "found = axis if full else _at_full_length(child, module, shapes, numbers, axis)",
        "found = axis",
        "what is mixed over a distance is not seen",
        ("fit_axes.py::test_axes_are_found_and_no_false_ones",),
    ),
    Mutant(
        "axes-of-numbers-met",
        "model/foreign/marked.py",
        "self.mark(made, _where(func, args, kwargs, made, marks, of))",
        "pass",
        "whole numbers that no trial has met are not thought of",
        ("fit_axes.py::test_axes_hold_for_whole_numbers_that_no_trial_has_met",),
    ),
    Mutant(
        "axes-in-double-alone",
        "model/foreign/independence.py",
        "if found is not None and _in_full(*about, found) and _in_its_dtypes(*about, found):",
        "if found is not None and _in_full(*about, found):",
        "what is done in other dtypes than double precision is not seen",
        ("fit_axes.py::test_axes_hold_in_the_dtype_of_the_call",),
    ),
    Mutant(
        "axes-of-zeros",
        "model/foreign/probing.py",
        "torch.rand(parameter.shape, generator=self.random, dtype=dtype) - 0.5",
        "parameter.detach().double()",
        "parameters that are zero hide what is mixed",
        ("fit_axes.py::test_axes_are_found_and_no_false_ones",),
    ),
    Mutant(
        "axes-not-compared",
        "model/foreign/probing.py",
        "if axis is not None and alike and self._same(axis, whole):",
        "if axis is not None and alike:",
        "slices are not compared with the whole but for large numbers",
        ("fit_axes.py::test_axes_are_found_and_no_false_ones",),
    ),
    Mutant(
        "fit-weights-of-modules",
        "model/foreign/runs.py",
        "        if self._runs_again:",
        "        if False:",
        "a module runs again on weights that have changed",
        ("fit_loops.py::test_weights_of_modules_that_run_again_may_not_change_before",),
    ),
    Mutant(
        "frontier-long-chains",
        "planner/solvers/frontier.py",
        "        if len(self.table.groups) > MANY:\n            return False\n",
        "",
        "grids are left out by one that leaves out long checkpoints itself",
        ("frontier.py::test_of_long_chains_every_grid_is_asked",),
    ),
    Mutant(
        "noise-of-the-first-slice",
        "model/foreign/noise.py",
        "self._span.start * (size // self.length)",
        "0 * (size // self.length)",
        "every slice is given the first one's random numbers",
        ("fit_noise.py",),
    ),
    Mutant(
        "noise-drawn-anew",
        "model/foreign/slices.py",
        "with slices.random or nullcontext():",
        "with nullcontext():",
        "slices that run again draw other numbers than they drew",
        ("fit_noise.py",),
    ),
    Mutant(
        "noise-not-reset",
        "model/foreign/slices.py",
        "            slices.random.reset()\n",
        "",
        "a module that turns out to run as a whole has drawn once already",
        ("fit_noise.py",),
    ),
    Mutant(
        "kept-without-layers",
        "planner/fitting/problem.py",
        'return "step", told(self.model), *digests',
        'return "step", *digests',
        "steps of models with hooks are read that were simulated without",
        ("kept_fits.py",),
    ),
    Mutant(
        "kept-without-imports",
        "model/foreign/sources.py",
        "map(_module_of, list(vars(module).values()))",
        "()",
        "a model is not seen to have changed where its own file has not",
        ("kept_fits.py",),
    ),
    Mutant(
        "selective-written-over",
        "model/running/internals.py",
        "return any(isinstance(mode, _SELECTIVE) for mode in modes)",
        "return False",
        "results that a selective checkpoint has kept are written over",
        ("in_place.py",),
    ),
    Mutant(
        "knobs-not-compared",
        "model/foreign/equal_results.py",
        "if error > min(probe.close, CLOSE_IN_SINGLE):",
        "if False:",
        "a knob that changes results is turned",
        ("fit_knobs.py",),
    ),
    Mutant(
        "knobs-not-in-redos",
        "model/foreign/inside.py",
        "with self.inside.turned.in_force(), self.inside.below(self.path):",
        "with self.inside.below(self.path):",
        "a module runs again in backward with its knobs as they were",
        ("fit_knobs.py",),
    ),
    Mutant(
        "any-order-memory",
        "planner/solvers/any_order.py",
        "least - prices * (room - table.loss_bytes)",
        "least - 0.5 * prices * (room - table.loss_bytes)",
        "memory is paid for twice: a bound that schedules beat",
        ("any_order.py", "certificates.py"),
    ),
    Mutant(
        "proof-price",
        "tools/check_certificate.py",
        "ticks + -TICKS * price * (room - self.loss) // 1",
        "ticks",
        "the checker takes bounds that are too high",
        ("certificates.py",),
    ),
    Mutant(
        "proof-need",
        "tools/check_certificate.py",
        "return [NEVER] * need + [int(TICKS * seconds)]",
        "return [int(TICKS * seconds)] * need + [int(TICKS * seconds)]",
        "the checker proves less than is true",
        ("certificates.py",),
    ),
    Mutant(
        "slices-settings",
        "model/foreign/slices.py",
        "if not settings.hold(child.path, module):",
        "if False:",
        "a module whose settings have changed goes on in slices",
        ("fit_axes.py::test_a_switch_that_is_turned_is_seen",),
    ),
    Mutant(
        "unread-by-subclasses",
        "model/running/affine.py",
        "return said and as_here and not others",
        "return True or not others",
        "what goes on after a product that was left out is differentiated on garbage",
        ("unread.py::test_subclasses_that_go_on_are_right",),
    ),
    Mutant(
        "unread-under-hooks",
        "model/running/affine.py",
        "and not others and not any(altered_layers(submodule))",
        "",
        "hooks see what was never made",
        ("unread.py::test_what_hangs_on_its_layers_sees_numbers",),
    ),
    Mutant(
        "unread-in-the-middle",
        "planner/schedules/schedule.py",
        "return redo and part is body.parts[-1]",
        "return redo",
        "a step in the middle of a redo leaves out what the next one reads",
        ("unread_reruns.py::test_a_planned_model_has_the_gradients_of_the_model",),
    ),
    Mutant(
        "ending-costs-a-forward",
        "planner/schedules/replay.py",
        "run = cost.ending if ends_redo(part, body, redo) else cost.forward",
        "run = cost.forward",
        "the replay charges a rerun for a product that it leaves out",
        ("replay.py::test_a_redo_ends_with_what_its_backward_needs",),
    ),
    Mutant(
        "unread-heard",
        "planner/execution/submodules.py",
        "if action.unread and not _is_more_than_its_stages(step.submodule):",
        "if action.unread:",
        "what hangs on a submodule is not called when it runs again",
        ("unread_reruns.py::test_whoever_hangs_on_a_submodule_sees_numbers",),
    ),
    Mutant(
        "adapters-not-shown",
        "model/foreign/declared.py",
        "if max(errors) > self.close:",
        "if False:",
        "an adapter that is wrong is believed",
        ("fit_adapters.py::test_a_wrong_adapter_is_found_out",),
    ),
    Mutant(
        "adapters-kept",
        "planner/fitting/problem.py",
        "(where, dtype, autocast, place, of_blocks, layers)",
        "(where, dtype, autocast, place, of_blocks)",
        "what an earlier adapter was shown to be is believed of another",
        ("fit_adapters.py::test_an_adapter_that_is_another_now_is_shown_anew",),
    ),
    Mutant(
        "adapters-old-code",
        "model/foreign/declared.py",
        "and _runs_its_own_code(self.module, self.forward)",
        "",
        "a forward that was hung on a module since is forgotten",
        ("fit_adapters.py::test_what_has_changed_since_runs_as_it_is",),
    ),
    Mutant(
        "adapters-gradient-of-masks",
        "model/adapters/adapter.py",
        "if any(call.tensors[name].requires_grad for name in made.constants):",
        "if False:",
        "a mask that wants a gradient gets none",
        ("fit_adapters.py::test_a_mask_that_wants_a_gradient_gets_one",),
    ),
    Mutant(
        "update-with-target",
        "model/running/gradients.py",
        "if target in wanted and not submodule.residual:",
        "if False:",
        "a gradient passes by where nothing is added",
        ("fit_adapters.py::test_results_and_gradients_are_the_modules_own",),
    ),
    Mutant(
        "rehearsal-buffers",
        "model/foreign/as_they_were.py",
        "        put_back(buffers)",
        "        pass",
        "fitting a model changes its buffers",
        ("fit_times.py::test_measuring_leaves_everything_as_it_is",),
    ),
    Mutant(
        "rehearsal-attributes",
        "model/foreign/as_they_were.py",
        "                _put(contents)",
        "                pass",
        "fitting a model changes its attributes",
        ("fit_rehearsal.py",),
    ),
    Mutant(
        "fit-threads",
        "planner/fitting/patched.py",
        "self._lock = ExitStack(), threading.RLock()",
        "self._lock = ExitStack(), ExitStack()",
        "of two threads in a block each puts back what the other has put there",
        ("fit_loops.py::test_threads_leave_nothing_in_modules",),
    ),
    Mutant(
        "fit-undone",
        "planner/fitting/patched.py",
        "            self.runs.undo(call)\n",
        "",
        "a block that returned something else draws, counts and writes twice",
        ("fit_loops.py::test_blocks_that_return_something_else_run_as_written",),
    ),
    Mutant(
        "shared-buffers",
        "model/foreign/runs.py",
        "for tied, name in members(module).tied_buffers.items() if name in put}",
        "for tied, name in ()}",
        "of a buffer with two names one is put aside, and a statistic counts twice",
        ("fit_odd_modules.py::test_buffers_that_modules_share_are_changed_once",),
    ),
    Mutant(
        "quiet-buffers",
        "planner/fitting/met.py",
        "if mark(name, now[name]) != then or found.get(name) != values.get(name):",
        "if mark(name, now[name]) != then:",
        "statistics that a kernel writes in training alone count twice",
        ("fit_odd_modules.py::test_statistics_count_once_or_it_is_said_that_they_do_not",),
    ),
    Mutant(
        "slices-sum-in-place",
        "model/foreign/slices.py",
        "self.whole[number] = there + wide",
        "self.whole[number] = there.add_(wide)",
        "gradients of two terms of a sum are one tensor, which is added to twice",
        ("fit_axes.py::test_gradients_that_are_one_tensor_are_summed_apart",),
    ),
    Mutant(
        "fit-as-written-shared",
        "planner/fitting/ghosts.py",
        "if not shared:",
        "if True:",
        "gradients of parameters that blocks share are not counted until the last of them",
        ("fit.py::test_the_measured_peak_is_the_predicted_one",),
    ),
    Mutant(
        "fit-spares",
        "planner/fitting/solving.py",
        "        if spare >= 0:\n            yield fit",
        "        if spare >= -budget // 50:\n            yield fit",
        "a plan may be over its budget by two per cent",
        ("fit.py", "fit_originals.py"),
    ),
    Mutant(
        "trace-forgets-what-a-block-keeps-of-its-own",
        "cost_model/calls.py",
        "return StepCost(strategy, *of_bytes, *works, keeps_made=keeps)",
        "return StepCost(strategy, *of_bytes, *works)",
        "a block that reads what it has made holds it to its backward, uncounted",
        ("fit.py::test_what_a_block_keeps_of_what_it_makes_counts_once",),
    ),
    Mutant(
        "replay-forgets-what-a-step-keeps-of-its-own",
        "planner/schedules/replay.py",
        "            self.keep(record.own)\n",
        "            record.own = ()\n",
        "a step that keeps what it has made holds it to its backward, uncounted",
        ("replay.py::test_a_step_that_keeps_what_it_has_made",),
    ),
    Mutant(
        "lean-forgets-what-is-written",
        "model/foreign/lean.py",
        "            self.remaking.writes(storage_key(tensor))",
        "            storage_key(tensor)",
        "what is made again is made of what has been written over",
        ("fit.py::test_what_is_made_again_is_made_of_what_was_there",),
    ),
    Mutant(
        "executor-writes-over-what-a-hook-keeps",
        "planner/execution/apply.py",
        "owned = not _has_hooks(chain)",
        "owned = True",
        "inference writes over tensors that a hook may have kept",
        ("changes.py",),
    ),
    Mutant(
        "offload-copy-free",
        "planner/solvers/offload.py",
        "return sum(max(own, copy) for own in both)",
        "return sum(both)",
        "the solver takes copies for free, however little runs beside them",
        ("offload_solver.py",),
    ),
    Mutant(
        "offload-window",
        "planner/solvers/offload.py",
        "room, copy = memory - leaves, self.copy_seconds(leaves)",
        "room, copy = memory, self.copy_seconds(leaves)",
        "what leaves is forgotten while it is still there",
        ("offload_solver.py",),
    ),
    Mutant(
        "offload-replay-frees-at-once",
        "planner/schedules/replay.py",
        "            if number and not redo:\n                self.copied",
        "            if part.wait:\n                self.put_away(record)\n"
        "            if False:\n                self.copied",
        "the replay takes what leaves for gone before its copy can have ended",
        ("offload.py",),
    ),
    Mutant(
        "offload-read-too-early",
        "planner/execution/departures.py",
        "            self._host.there(self._coming.pop(coming))",
        "            self._coming.pop(coming)",
        "backward reads what is still on its way back",
        ("offload_running.py",),
    ),
    Mutant(
        "offload-past-parts",
        "planner/execution/departures.py",
        "for late in [n for n in self._away if n >= number]:",
        "for late in [n for n in self._away if n == number]:",
        "backward that comes past a part leaves its state on the host, which earlier parts read",
        ("offload_running.py",),
    ),
    Mutant(
        "donated-in-two-hands",
        "planner/execution/donating.py",
        "or holders(tensor) > 1",
        "or False",
        "a tensor is taken whose view the caller still looks at",
        ("donated.py::test_tensors_that_others_look_at_are_refused",),
    ),
    Mutant(
        "donated-twice",
        "planner/execution/donating.py",
        "        elsewhere.add(storage_key(tensor))\n",
        "",
        "two inputs in one memory are written over, one by the other",
        ("donated.py::test_one_tensor_is_not_taken_twice",),
    ),
    Mutant(
        "donated-and-held",
        "planner/execution/donating.py",
        "    tensor.set_()  # type: ignore[call-overload]\n",
        "",
        "the caller keeps what was donated, so that it is not freed",
        ("donated.py",),
    ),
    Mutant(
        "donated-state-at-the-start",
        "planner/solvers/inference.py",
        "max(map(table.bytes_of, ends)) > budget",
        "table.bytes_of(table.liveness.outputs) > budget",
        "a schedule begins with more state than the budget",
        ("donated.py::test_all_of_the_state_is_there_when_a_step_begins",),
    ),
    Mutant(
        "gpu-runs-what-is-there",
        "experiments/gpu/parts.py",
        "        if results.has(name):",
        "        if not name:",
        "a part that was stopped begins anew",
        ("gpu_experiment.py::test_a_stopped_part_goes_on_where_it_was",),
    ),
    Mutant(
        "verify-budget",
        "planner/checking/verify.py",
        "budget is None or peak <= budget,",
        "True,",
        "the measured peak is not compared with the budget",
        ("verify.py::test_what_is_no_success",),
    ),
    Mutant(
        "verify-peak",
        "planner/checking/verify.py",
        "abs(peak - expected) <= max(PEAK_TOLERANCE * expected, PEAK_FLOOR),",
        "peak <= expected + max(PEAK_TOLERANCE * expected, PEAK_FLOOR),",
        "a prediction that is far too high passes",
        ("verify.py::test_what_is_no_success",),
    ),
    Mutant(
        "verify-gradients",
        "planner/checking/verify.py",
        "gradient_error is None or gradient_error <= numerics or",
        "gradient_error is None or gradient_error <= 1 or",
        "wrong gradients pass",
        ("verify.py::test_gradients_are_compared",),
    ),
    Mutant(
        "matmul-split",
        "cost_model/matmul.py",
        "Split(devices, whole / devices, comms, whole,",
        "Split(devices, whole, comms, whole,",
        "every device of a split product does all of it",
        ("roofline.py::test_two_devices_send_each_other_one_partial_result",),
    ),
    Mutant(
        "matmul-batch",
        "cost_model/matmul.py",
        "gain = 2 * self.d * self.f - least * (self.d + self.f)",
        "gain = 2 * self.d * self.f - least * self.d",
        "the batch from which on arithmetic counts is too small",
        ("roofline.py::test_the_least_batch_is_where_the_bound_changes",),
    ),
    Mutant(
        "frontier-exact-peaks",
        "planner/solvers/frontier.py",
        "if self._peak(index, units) <= budget_bytes",
        "if units <= below + 2",
        "what is found ahead of a budget need not fit it",
        ("frontier.py::test_steep_falls_come_at_exact_peaks",),
    ),
    Mutant(
        "frontier-steps",
        "planner/solvers/frontier.py",
        "budgets.add(self.output_bytes + first)",
        "budgets.add(self.output_bytes)",
        "steps of a finer grid are lost where the coarser one is asked first",
        ("pictures.py",),
    ),
    Mutant(
        "capacity-bisection",
        "planner/plans/capacity.py",
        "while high - low > unit:",
        "while high - low > 2 * unit:",
        "fewer residues are found than fit",
        ("capacity.py::test_bisection_finds_the_last_that_fits",),
    ),
    Mutant(
        "labels-frame",
        "planner/reports/labels.py",
        "if inside and not any(",
        "if not any(",
        "labels leave the frame",
        ("roofline.py::test_labels_of_near_points_and_of_points_at_the_frame",),
    ),
    Mutant(
        "table-parts",
        "planner/reports/tables.py",
        "minimum <= console.width for part in found",
        "minimum <= 2 * console.width for part in found",
        "figures of wide tables are folded",
        ("roofline.py::test_at_80_columns_every_figure_is_whole",),
    ),
]


def mutated(mutant: Mutant, root: Path) -> str:
    """The text of its file with the fault in it.

    Raises:
        ValueError: the place is not there any more, or not the only one.
    """
    text = (root / mutant.file).read_text()
    if (found := text.count(mutant.find)) != 1:
        raise ValueError(f"{mutant.name}: its text is {found} times in {mutant.file}; see tests/mutants.py")
    return text.replace(mutant.find, mutant.put)


def copy_of_tree(to: Path) -> Path:
    """The tree as it is, without what was built or kept beside it."""
    left_out = shutil.ignore_patterns(".?*", "__pycache__", "build", "*.egg-info")
    return shutil.copytree(ROOT, to, symlinks=True, ignore=left_out)


def run_tests(root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Pytest's exit code and what it says, of tests in a copy of the tree."""
    paths = [f"tests/test_{test}" for test in tests] or ["tests"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    # Without bytecode: a fault may be put in and taken out again within the second that tells them apart.
    changes = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    # One process: it and the other copy's share two cores, each with one thread.
    changes |= {"OMP_NUM_THREADS": "1", "EVOPLAN_TRACES": str(root / "traces")}
    done = subprocess.run(
        [*command, "-m", "not slow and not gpu", *paths],
        cwd=root, env={**os.environ, **changes}, capture_output=True, text=True, check=False,
        timeout=SECONDS if tests else None,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def outcome(mutant: Mutant, root: Path, whole_suite: bool) -> str:
    """`killed`, `survives`, or what went wrong: tests that cannot be run kill nothing."""
    path = root / mutant.file
    before = path.read_text()
    path.write_text(mutated(mutant, root))
    try:
        code, said = run_tests(root, () if whole_suite else mutant.tests)
    except subprocess.TimeoutExpired:
        return "killed (hangs)"
    finally:
        path.write_text(before)
    if code == 1:
        failed = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        return f"killed by {failed.split(' - ')[0].partition(' ')[2]}"
    return "SURVIVES" if code == 0 else f"SURVIVES: no test was run\n{said}"


def tried(mutants: list[Mutant], whole_suite: bool) -> Iterator[tuple[Mutant, str, float]]:
    """Each with its outcome and the seconds that it took, in order."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(COPIES) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(COPIES):
            copies.put(copy_of_tree(Path(folder) / str(number)))

        def attempt(mutant: Mutant) -> tuple[Mutant, str, float]:
            root, start = copies.get(), time.monotonic()
            try:
                return mutant, outcome(mutant, root, whole_suite), time.monotonic() - start
            finally:
                copies.put(root)

        yield from pool.map(attempt, mutants)


@click.command()
@click.option("--all", "whole_suite", is_flag=True, help="Run the whole suite against each.")
@click.argument("names", nargs=-1)
def main(whole_suite: bool, names: tuple[str, ...]) -> None:
    """Try mutants, all of them if none is named."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise click.BadParameter(f"no mutants: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    nearest = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        code, said = run_tests(copy_of_tree(Path(folder) / "whole"), tuple(nearest))
    if code:
        raise click.ClickException(f"tests fail without any fault:\n{said}")
    surviving = []
    for mutant, found, seconds in tried(chosen, whole_suite):
        click.echo(f"{mutant.name:<40} {seconds:4.0f} s  {found}")
        if found.startswith("SURVIVES"):
            surviving.append(mutant)
    click.echo(f"{len(chosen)} mutants, {len(surviving)} survive")
    for mutant in surviving:
        click.echo(f"  {mutant.name}: {mutant.why}")
    sys.exit(1 if surviving else 0)


if __name__ == "__main__":
    main()

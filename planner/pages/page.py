"""One page about a plan: HTML, SVG and a little script in one file, which asks nothing of a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evoplan.planner.pages.content import Content
from evoplan.planner.pages.data import data_of
from evoplan.planner.pages.draw_frontier import draw_frontier
from evoplan.planner.pages.draw_memory import draw_memory, scale_of
from evoplan.planner.pages.draw_stack import draw_stack
from evoplan.planner.pages.timing import LAYERS, WORDS, groups_of
from evoplan.planner.pages.verified import Verified
from evoplan.planner.sizes import exact_size, format_seconds, format_size

OWNERS = 12  # rows of the table of what a moment is made of
_KINDS = {
    "whole": "whole: keeps what autograd saves", "lean": "lean: keeps what is expensive to make again",
    "chunk": "chunk: in n pieces, keeps its input", "coshard": "coshard: heads or channels in n shares",
    "inside": "with modules of it recomputed",
}  # fmt: skip
_PHASES = {
    "forward": "forward", "discard": "forward, keeping nothing", "loss": "loss", "redo": "redo",
    "redo discard": "redo, keeping nothing", "backward": "backward", "to host": "to the host",
    "from host": "from the host",
}  # fmt: skip


def page(content: Content) -> str:
    """The page as a text."""
    sections = [_header(content), _stack(content), _memory(content), _frontier(content)]
    sections += [_verified(content.verified) if content.verified else "", _proofs(content)]
    data = data_of(content.account) if content.account else {}
    return html_page(content.title, "\n".join(filter(None, sections)), data, "page.js")


def html_page(title: str, body: str, data: dict[str, Any], script: str) -> str:
    """A page that loads nothing: its style, its body, what its script reads, and the script.

    Args:
        body: markup.
        data: plain types.
        script: the file of it, beside this one.
    """
    text = json.dumps(data, separators=(",", ":"))
    return _PAGE.format(
        title=escape(title),
        style=_beside("page.css"),
        body=body,
        data=text.replace("<", "\\u003c"),  # no name ends the script that it stands in
        script=_beside(script),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>evoplan: {title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _header(content: Content) -> str:
    predicted, none = content.predicted, content.baselines.get("none")
    budget = "none" if content.budget is None else format_size(content.budget)
    activations, times = predicted.activation_bytes, content.costs.get("time", "?")
    figures = [
        ("budget", budget, "" if content.budget is None else f"{content.budget:,} bytes"),
        ("predicted peak", format_size(predicted.peak_bytes), f"{predicted.peak_bytes:,} bytes"),
        ("of which activations", format_size(activations), f"{activations:,} bytes"),
        ("predicted step", format_seconds(predicted.step_seconds), f"times: {times}"),
    ]
    if none is not None:
        ratio = none.peak_bytes / predicted.peak_bytes
        time = predicted.step_seconds / none.step_seconds
        figures.append(("without a plan", format_size(none.peak_bytes),
                        f"{ratio:.3g} x the memory; the plan takes {time:.3g} x the time"))  # fmt: skip
    tiles = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(more)}</small></div>"
        for name, value, more in figures
    )
    return (
        f"<header><h1>{escape(content.title)}</h1><p>{escape(content.subtitle)}</p>"
        f'<div class="tiles">{tiles}</div></header>'
    )


def _stack(content: Content) -> str:
    cells = content.decisions.cells
    kinds = [kind for kind in _KINDS if any(cell.kind == kind for cell in cells)]
    kinds += sorted({cell.kind for cell in cells} - set(_KINDS))
    keys = [(f"k-{kind}", _KINDS.get(kind, kind)) for kind in kinds]
    more = []
    if any(cell.runs > 1 for cell in cells):
        more.append("pale: forward runs again in backward, a tick for each time")
    if content.decisions.brackets:
        more.append("frames and brackets: checkpoints, the inner within the outer")
    if any(cell.kernel for cell in cells):
        kernels = ", ".join(sorted({cell.kernel for cell in cells if cell.kernel}))
        more.append(f"dot: attention by {kernels}")
    if any(cell.away for cell in cells):
        more.append("corner: something lies in host memory on its account")
    deepest = max((one.level + 1 for one in content.decisions.brackets), default=0)
    nested = f", checkpoints {deepest} deep" if deepest else ""
    return (
        f"<section><h2>What is done with each of {len(cells)} steps{nested}</h2>{_legend(keys, more)}"
        f'{draw_stack(content.decisions)}<p class="small" id="cell" aria-live="polite">&nbsp;</p></section>'
    )


def _legend(keys: list[tuple[str, str]], more: Iterable[str] = ()) -> str:
    items = "".join(f'<li><i class="{name}"></i>{escape(words)}</li>' for name, words in keys)
    items += "".join(f"<li>{escape(words)}</li>" for words in more)
    return f'<ul class="legend">{items}</ul>'


def _memory(content: Content) -> str:
    account = content.account
    if account is None:
        static = ", ".join(f"{name} {format_size(size)}" for name, size in content.static.items() if size)
        return (
            f"<section><h2>Memory over the step</h2><p>{escape(content.no_account)}</p>"
            f"<p>static: {escape(static)}</p></section>"
        )
    at = account.peak_index
    moment, parts = account.moments[at], account.holdings.parts[at]
    layers = {"static": account.fixed_bytes, **parts}
    keys = [(f"m-{name}", WORDS[name]) for name in reversed(LAYERS) if layers[name] or name != "gradients"]
    phases = dict.fromkeys(moment.phase for moment in account.moments)
    strip = [(f"p-{phase.replace(' ', '-')}", _PHASES[phase]) for phase in phases]
    least, most = scale_of(account, content.budget)
    dashed = ["dashed: the budget"] if content.budget is not None and content.budget <= most else []
    if least:
        dashed.append(f"the picture begins at {format_size(least)}")
    outputs = ""
    if account.output_bytes:
        outputs = f" The outputs ({format_size(account.output_bytes)}) are of the state here."
    bar = "".join(
        f'<i class="m-{name}" style="width:{100 * layers[name] / account.peak_bytes:.3f}%"></i>'
        for name in LAYERS
    )
    rows = groups_of(account, at)[:OWNERS]
    body = "".join(
        f'<tr><td><i class="m-{kind}"></i>{escape(what)}</td><td>{count}</td>'
        f"<td>{format_size(size)}</td><td>{100 * size / account.peak_bytes:.1f} %</td></tr>"
        for kind, what, count, size in rows
    )
    sums = "; ".join(f"{WORDS[name]} {format_size(layers[name])}" for name in LAYERS if layers[name])
    return (
        f"<section><h2>Memory over the step</h2>{_legend(keys, dashed)}"
        f"{draw_memory(account, content.budget)}{_legend(strip)}"
        f'<p class="small">{escape(content.beside)}{outputs} <span class="screen">Point at the picture, or '
        "focus it and use the arrow keys, to see what a moment is made of.</span></p>"
        f'<div id="moment"><h3>The peak: {escape(moment.phase)} of {escape(account.where(moment))}, '
        f'{exact_size(account.peak_bytes)}</h3><p class="small">{sums}</p><div class="bar">{bar}</div>'
        "<table><thead><tr><th>what is live</th><th>tensors</th><th>bytes</th><th>of all</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _frontier(content: Content) -> str:
    found = content.frontier
    what = "line: the fastest plans; " if found.points else ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{format_size(size)}</td><td>{format_seconds(seconds)}</td>"
        f"<td>{size / content.predicted.peak_bytes:.2f}</td>"
        f"<td>{seconds / content.predicted.step_seconds:.2f}</td></tr>"
        for name, (size, seconds) in found.marks.items()
    )
    least = "" if content.least_bytes is None else f"; least memory {format_size(content.least_bytes)}"
    return (
        f'<section><h2>Memory and time</h2><p class="small">{what}dots: this plan, and what people do by '
        f"hand{least}</p>{draw_frontier(found)}<table><thead><tr><th></th><th>peak</th><th>step</th>"
        f"<th>peak / plan</th><th>step / plan</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _verified(found: Verified) -> str:
    static = found.static_bytes
    unplanned = found.unplanned_peak_bytes
    sizes: list[tuple[str, list[int | None]]] = [
        ("peak", [found.predicted_peak_bytes, found.measured_peak_bytes, unplanned]),
        ("activations", [found.predicted_peak_bytes - static, found.measured_peak_bytes - static,
                         None if unplanned is None else unplanned - static]),
    ]  # fmt: skip
    times = [found.predicted_step_seconds, found.measured_step_seconds, found.unplanned_step_seconds]
    rows = [_measured(name, values, format_size) for name, values in sizes]
    rows.append(_measured("step time", times, format_seconds))
    errors = [("loss", found.max_loss_error), ("any gradient", found.max_gradient_error)]
    said = "; ".join(f"largest error of {name} {error:.2g}" for name, error in errors if error is not None)
    verdict = "the promise was kept" if found.ok else "FAILED"
    return (
        '<section><h2>Predicted and measured</h2><table class="even"><thead><tr>'
        f"<th>{escape(found.backend)}</th>"
        "<th>predicted</th><th>measured</th><th>without a plan</th></tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table><p class="small">{said}{"; " if said else ""}{verdict}</p>'
        "</section>"
    )


def _measured(name: str, values: Sequence[float | None], words: Callable[[float], str]) -> str:
    """A row with a bar under each figure."""
    most = max((value for value in values if value is not None), default=0) or 1
    cells = "".join(
        "<td>-</td>"
        if value is None
        else f'<td>{words(value)}<div class="bar"><i class="m-state" '
        f'style="width:{max(0, 100 * value / most):.2f}%"></i></div></td>'
        for value in values
    )
    return f"<tr><td>{name}</td>{cells}</tr>"


def _proofs(content: Content) -> str:
    solver = content.solver
    said = [one.in_words() for one in solver.certificates]
    if not said and solver.gap is not None:
        said.append(f"at most {solver.gap:.2%} slower than the fastest schedule on offer")
    if not said:
        said.append("no bound is proven; `evoplan plan --certify` proves one")
    said += [f"{name}: {where}" for name, where in content.costs.items()] + list(content.notes)
    items = "".join(f"<li>{escape(words)}</li>" for words in said)
    return (
        f"<section><h2>What is proven, and where figures come from</h2><ul><li>solved by "
        f"{escape(solver.name)} in {format_seconds(solver.seconds)}</li>{items}</ul></section>"
    )

"""A report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from scatterbrain.tuning.calls import (
    AttentionMap,
    CallReport,
    Measurement,
    PlannedCall,
    duration,
    fraction,
    number,
    speed_up,
)

# Pixels of the heat map.
CELL_WIDTH, CELL_HEIGHT, METHOD_GAP, HEAD, CHARACTER = 36, 22, 8, 44, 7
# Colours of errors: 0.01 and less, 0.1, 1 and more; in between, by the logarithm.
COLOURS = ((33, 102, 172), (240, 240, 238), (202, 84, 18))
COLOUR_RANGE = (0.01, 0.1, 1.0)

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --band: #f6f8fa;
  --mark: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --band: #151b23; --mark: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2rem 0 .3rem; font-size: 1.15rem; }
p { margin: .3rem 0 .8rem; max-width: 52rem; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1rem 0; } dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; }
th { position: sticky; top: 0; background: var(--band); padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .3rem .7rem; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
th button::after { content: " \\2195"; color: var(--soft); opacity: .5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; color: var(--mark); }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; color: var(--mark); }
tbody tr:hover { background: var(--band); }
summary { cursor: pointer; margin: 1rem 0; } summary:focus-visible { outline: 2px solid var(--mark); }
svg { display: block; font: 11px system-ui, sans-serif; } svg .label { fill: var(--ink); }
svg .soft { fill: var(--soft); }
.chosen { fill: none; stroke: var(--ink); stroke-width: 2.5; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, 9.2rem); gap: .6rem; margin: .3rem 0 .8rem; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--soft); }
h3 { margin: 1rem 0 0; font-size: 1rem; } h3 + p, .maps + p { margin: 0; }
figure img { width: 9rem; height: 9rem; image-rendering: pixelated; border-radius: 3px; }
figure img.photo { image-rendering: auto; }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const [m, n] = [Number(x), Number(y)];
      return (up ? 1 : -1) * (isNaN(m) || isNaN(n) ? x.localeCompare(y, undefined, { numeric: true }) : m - n);
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    table.tBodies[0].append(...rows);
  }));
}
"""


def page(
    model: str,
    about: str,
    calls: Sequence[CallReport],
    not_reached: Mapping[str, int],
    thumbnails: Sequence[str],
    goal: str = "",
    choices: Sequence[PlannedCall] = (),
) -> str:
    """The HTML page of a report.

    Args:
        model: class of the model.
        about: where it was measured.
        calls: the attention calls.
        not_reached: attention that was not measured, with the number of calls.
        thumbnails: images that the attention maps are of, PNG files in base64.
        goal: of a plan.
        choices: of a plan, which the page marks; empty for none.
    """
    planned = {(call.name, call.index): call for call in choices}
    body = [f"<h1>Attention of {escape(model)}</h1>", f"<p>{escape(about)}</p>", _numbers(calls, goal, choices)]
    body += [
        "<h2>Error of the output</h2>",
        "<p>Relative Frobenius error against full attention, mean over the samples, for each attention call (rows) and "
        "method with its share of the attention columns. Small print: no faster than full attention here."
        + (f" Framed: the plan of {escape(goal)}." if choices else "")
        + "</p>",
        f'<div class="wide">{_heat_map(calls, planned)}</div>',
        "<h2>Calls</h2>",
        "<p>Effective keys: over how many keys a query spreads its weights, exp of their mean entropy. A click on the "
        "head of a column, or Enter on it, sorts.</p>",
        _calls(calls, planned),
        "<details><summary>All measurements</summary>",
        _measurements(calls),
        "</details>",
        _reasons(calls, not_reached),
        _maps(calls, thumbnails),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Attention of {escape(model)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _numbers(calls: Sequence[CallReport], goal: str, choices: Sequence[PlannedCall]) -> str:
    total = sum(call.milliseconds * call.num_calls for call in calls)
    items = [("Attention calls", str(sum(call.num_calls for call in calls)))]
    if total:
        items.append(("Full attention, all calls", duration(total)))
    if choices:
        items += [(f"Plan: {goal}", f"{speed_up(choices):.2f} times as fast")]
        items += [("Largest error in the plan", number(max(call.error for call in choices)))]
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items) + "</dl>"


# Heat map ------------------------------------------------------------------------------------------------------------


def _heat_map(calls: Sequence[CallReport], planned: dict[tuple[str, int], PlannedCall]) -> str:
    columns = list(dict.fromkeys((m.method, m.budget) for call in calls for m in call.measurements))
    left = CHARACTER * max(len(call.label) for call in calls) + 10
    places, x, previous = {}, left, None
    for method, budget in columns:
        x += METHOD_GAP if previous not in (None, method) else 0
        places[method, budget] = x
        x += CELL_WIDTH
        previous = method
    width, height = max(x + 10, left + 330), HEAD + CELL_HEIGHT * len(calls) + 46
    parts = []
    for method in dict.fromkeys(method for method, _ in columns):
        own = [places[column] for column in columns if column[0] == method]
        middle = (own[0] + own[-1] + CELL_WIDTH) / 2
        # names longer than their cells
        size = min(1.0, (own[-1] + CELL_WIDTH - own[0] + METHOD_GAP) / (CHARACTER * len(method)))
        parts.append(_text(middle, 14, method, "label", f' font-size="{11 * size:.1f}"'))
    parts += [
        _text(place + CELL_WIDTH / 2, 34, fraction(budget), "soft")
        for (_, budget), place in places.items()
        if budget is not None
    ]
    frames = []
    for row, call in enumerate(calls):
        y = HEAD + row * CELL_HEIGHT
        parts.append(_text(left - 8, y + 15, call.label, "label", anchor="end"))
        choice = planned.get((call.name, call.index))
        for measurement in call.measurements:
            x = places[measurement.method, measurement.budget]
            parts.append(_heat_cell(x, y, call, measurement))
            if choice is not None and (choice.method, choice.budget) == (measurement.method, measurement.budget):
                size = f'width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}"'
                frames.append(f'<rect class="chosen" x="{x + 1}" y="{y + 1}" {size}/>')
    y = HEAD + CELL_HEIGHT * len(calls) + 12
    for step in range(60):
        colour = _colour(10 ** (-2 + step / 29.5))
        parts.append(f'<rect x="{left + 3 * step}" y="{y}" width="3.2" height="10" fill="{colour}"/>')
    parts += [
        _text(left + 90 * i, y + 24, text, "soft", anchor=anchor)
        for i, (text, anchor) in enumerate((("≤ 0.01", "start"), ("0.1", "middle"), ("≥ 1", "end")))
    ]
    parts.append(_text(left + 200, y + 9, "relative error", "soft", anchor="start"))
    label = "Heat map of errors; the tables below hold the same numbers."
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return f'<svg role="img" aria-label="{label}" {size}>{"".join(parts + frames)}</svg>'


def _heat_cell(x: float, y: float, call: CallReport, measurement: Measurement) -> str:
    title = f"{call.label}, {measurement.label}: "
    box = f'x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}"'
    if measurement.error is None:
        return (
            f"<g><title>{escape(title + str(measurement.reason))}</title>"
            f'<rect {box} fill="none" stroke="var(--line)"/>{_text(x + 17.5, y + 15, "-", "soft")}</g>'
        )
    title += f"error {number(measurement.error)}"
    slow = False
    if measurement.milliseconds:
        slow = measurement.milliseconds >= call.milliseconds
        title += f", {call.milliseconds / measurement.milliseconds:.2f} times as fast as full attention"
    fill = _colour(measurement.error)
    size = 8 if slow else 11
    text = (
        f'<text x="{x + 17.5}" y="{y + 15}" text-anchor="middle" font-size="{size}" fill="{_ink(measurement.error)}">'
    )
    shown = "0" if measurement.error < 5e-4 else number(measurement.error)
    return f'<g><title>{escape(title)}</title><rect {box} fill="{fill}"/>{text}{shown}</text></g>'


def _text(x: float, y: float, text: str, kind: str, extra: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _rgb(error: float) -> tuple[int, ...]:
    low, _, high = (math.log10(x) for x in COLOUR_RANGE)
    place = (min(max(math.log10(max(error, 1e-9)), low), high) - low) / (high - low) * (len(COLOURS) - 1)
    first = min(int(place), len(COLOURS) - 2)
    share = place - first
    return tuple(round(a * (1 - share) + b * share) for a, b in zip(COLOURS[first], COLOURS[first + 1], strict=True))


def _colour(error: float) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in _rgb(error))


def _ink(error: float) -> str:
    """Black or white, whichever is easier to read on the colour of an error."""
    linear = [(c / 255 / 12.92) if c < 11 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(error)]
    luminance = sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


# Tables --------------------------------------------------------------------------------------------------------------

Cell = tuple[str, float | str | None]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str) -> str:
    """Table of cells (text, what to sort by; None is last)."""
    head = "".join(f'<th scope="col"><button type="button">{escape(column)}</button></th>' for column in columns)
    body = []
    for row in rows:
        cells = []
        for text, value in row:
            value = "" if value is None else value
            cells.append(f'<td data-value="{escape(str(value))}">{escape(text)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _calls(calls: Sequence[CallReport], planned: dict[tuple[str, int], PlannedCall]) -> str:
    columns = ["call", "B x H x T x E", "keys", "effective keys", "calls", "full ms", "smallest error"]
    columns += ["plan", "error", "times as fast"] if planned else []
    rows = []
    for order, call in enumerate(calls):
        able = [m for m in call.measurements if m.error is not None]
        best = min(able, key=lambda m: m.error, default=None)
        row: list[Cell] = [
            (call.label, order),
            (call.size, math.prod(call.shape)),
            (str(call.num_keys), call.num_keys),
            _cell(call.effective_keys, ".0f"),
            (str(call.num_calls), call.num_calls),
            _cell(call.milliseconds, ".3g"),
            ("", None) if best is None else (f"{number(best.error)}, {best.label}", best.error),
        ]
        choice = planned.get((call.name, call.index))
        if planned:
            row += [("", None)] * 3 if choice is None else _planned_cells(choice)
        rows.append(row)
    return _table(columns, rows, "Attention calls")


def _planned_cells(choice: PlannedCall) -> list[Cell]:
    ratio = choice.full_milliseconds / choice.milliseconds
    return [
        (choice.method_label, choice.method_label),
        (number(choice.error), choice.error),
        (f"{ratio:.2f}", ratio),
    ]


def _measurements(calls: Sequence[CallReport]) -> str:
    rows = []
    for order, call in enumerate(calls):
        for m in call.measurements:
            ratio = call.milliseconds / m.milliseconds if m.milliseconds else None
            rows.append(
                [
                    (call.label, order),
                    (m.method, m.method),
                    ("", None) if m.budget is None else (fraction(m.budget), m.budget),
                    ("", None) if m.error is None else (number(m.error), m.error),
                    _cell(m.milliseconds, ".3g"),
                    _cell(ratio, ".2f"),
                    (m.reason or "", m.reason),
                ]
            )
    columns = ["call", "method", "budget", "error", "ms", "times as fast", "not taken, since"]
    return _table(columns, rows, "All measurements")


def _cell(value: float | None, form: str) -> Cell:
    return ("", None) if value is None else (format(value, form), value)


def _reasons(calls: Sequence[CallReport], not_reached: Mapping[str, int]) -> str:
    rows = [
        f"<li>{escape(call.label)}: {escape(reason)} ({escape(', '.join(dict.fromkeys(labels)))})</li>"
        for call in calls
        for reason, labels in call.reasons().items()
    ]
    rows += [f"<li>{escape(name)}: {count} calls, not reached</li>" for name, count in not_reached.items()]
    return f"<h2>Not taken</h2><ul>{''.join(rows)}</ul>" if rows else ""


def _maps(calls: Sequence[CallReport], thumbnails: Sequence[str]) -> str:
    found = [call for call in calls if call.maps]
    if not found:
        return ""
    parts = [
        "<h2>Attention maps</h2><p>Weights of one query over the tokens of the image, mean over the heads "
        "(their roots, on one scale for a query).</p>"
    ]
    for png in thumbnails:
        parts.append(
            f'<figure><img class="photo" alt="The image" src="data:image/png;base64,{escape(png)}">'
            "<figcaption>input</figcaption></figure>"
        )
    for call in found:
        parts.append(f"<h3>{escape(call.label)}</h3>")
        rows: dict[str, list[AttentionMap]] = {}
        for shown in call.maps:
            rows.setdefault(shown.query, []).append(shown)
        for query, row in rows.items():
            figures = "".join(
                f'<figure><img alt="{escape(shown.label)}" src="data:image/png;base64,{escape(shown.png)}">'
                f"<figcaption>{escape(shown.label)}</figcaption></figure>"
                for shown in row
            )
            parts.append(f'<p>Query: {escape(query)}</p><div class="maps">{figures}</div>')
    return "".join(parts)

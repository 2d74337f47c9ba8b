"""The HTML pieces of the report: page, sections, figures, cards, tables. Text goes in escaped.

A piece is a string of markup; an empty piece is "". `escape` is applied here to every text, so a
caller passes plain text as `str` arguments named title, note, label, and markup as `*parts`.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1f2429; --soft: #5d6673;
  --grid: #e4e7eb; --base: #8b929c; --sft: #4a86d8; --reward: #d0892b; --ppo: #1d9d78;
  --evaluate: #9a6dd0; --other: #b5bac2; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2025;
  --ink: #e3e6ea; --soft: #98a1ad; --grid: #31373f; --other: #59616c; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 2px 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 0; }
h4 { font-size: 13px; margin: 22px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 12px; }
section { margin-top: 44px; }
section > p { color: var(--soft); max-width: 78ch; }
.kicker, figcaption, .soft { color: var(--soft); font-size: 13px; }
.verdict { font-size: 20px; line-height: 1.45; max-width: 62ch; margin-bottom: 8px; }
.warning { border-left: 3px solid var(--reward); padding-left: 12px; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 16px;
  margin-top: 12px; }
.card, figure, .sample, .box { background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; margin: 0; padding: 14px 16px; break-inside: avoid; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 16px;
  margin-top: 24px; }
.card b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.card span { display: block; }
.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.wide { grid-column: span 2; }
figure { display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; margin: 8px 0; color: var(--ink); }
figure svg text { font-family: inherit; }
figcaption { margin-top: auto; line-height: 1.4; }
.box { overflow-x: auto; margin-top: 12px; padding: 6px 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: break-word; }
th, td { text-align: left; padding: 8px 14px 8px 0; vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--soft); }
tr + tr > *, tbody tr > * { border-top: 1px solid var(--grid); }
td small { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4;
  max-width: 46ch; min-width: 22ch; }
td small.short { min-width: 0; }
.timeline { display: flex; height: 34px; gap: 2px; border-radius: 6px; overflow: hidden;
  margin: 12px 0 4px; }
.timeline span { color: #fff; font-size: 12.5px; font-weight: 600; line-height: 34px;
  padding-left: 8px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  min-width: 2px; }
.sample { margin-top: 12px; }
.sample > h3 { font-weight: 600; margin-bottom: 8px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 20px; }
.columns > div { border-top: 3px solid; padding-top: 6px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 0; }
.text i { color: var(--soft); font-style: normal; }
.chip { float: right; border-radius: 10px; padding: 0 9px; font-size: 12.5px; line-height: 20px;
  font-variant-numeric: tabular-nums; }
td .chip { float: none; }
.stage { font-size: 12.5px; font-weight: 650; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.time { white-space: nowrap; }
@media (max-width: 860px) { .grid, .two { grid-template-columns: minmax(0, 1fr); }
  .wide { grid-column: auto; } }
@media (max-width: 600px) { main { padding: 28px 16px 48px; } h1 { font-size: 26px; }
  .verdict { font-size: 18px; } .cards { gap: 12px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
  figure svg { overflow: visible; } .two svg text { font-size: 9px !important; }
  .wide svg text { font-size: 11px !important; } }
@media print { body { background: none; font-size: 12px; } main { padding: 0; max-width: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } section { margin-top: 28px; }
  .grid { grid-template-columns: repeat(3, 1fr); }
  .two { grid-template-columns: repeat(2, 1fr); } }
"""


def page(title: str, *parts: str) -> str:
    """The whole document around the parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A headed section; nothing at all when all of its parts are empty."""
    if not any(parts):
        return ""
    note = f"<p>{escape(note)}</p>\n" if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}{''.join(parts)}</section>\n"


def grid(parts: Iterable[str], heading: str = "", *, columns: int = 3) -> str:
    """Figures side by side under a small heading, in two or three columns."""
    if not (figures := [part for part in parts if part]):
        return ""
    heading = f"<h4>{escape(heading)}</h4>\n" if heading else ""
    name = "grid two" if columns == 2 else "grid"
    return f'{heading}<div class="{name}">\n{"".join(figures)}</div>\n'


def figure(title: str, svg: str, note: str, *, wide: bool = False) -> str:
    """A figure with its heading above and how to read it below."""
    return (
        f"<figure{' class=wide' if wide else ''}><h3>{escape(title)}</h3>\n{svg}\n"
        f"<figcaption>{escape(note)}</figcaption></figure>\n"
    )


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """The headline figures: (figure, what it is, what to compare it with)."""
    body = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f'<span class="soft">{escape(note)}</span></div>\n'
        for value, label, note in items
    )
    return f'<div class="cards">\n{body}</div>\n' if items else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markup cells under plain-text headings."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="box"><table>{head}<tbody>\n{body}</tbody></table></div>\n'


def key_table(tree: dict) -> str:
    """A nested dict as a table of dotted keys and JSON values."""
    rows = [
        [f"<code>{escape(key)}</code>", f"<code>{escape(json.dumps(value))}</code>"]
        for key, value in _flat(tree).items()
    ]
    return table(["", ""], rows)


def timeline(items: Sequence[tuple[str, str, float]]) -> str:
    """One bar whose segments are as long as (label, colour name, seconds) say.

    A label without room in its segment shows when the pointer rests there.
    """
    total = sum(seconds for *_, seconds in items)
    segments = [
        f'<span style="flex: {seconds:.1f} 0 0; background: var(--{color})" '
        f'title="{escape(label)}">{escape(label) if seconds > 0.12 * total else ""}</span>'
        for label, color, seconds in items
    ]
    return f'<div class="timeline">{"".join(segments)}</div>\n'


def details(summary: str, *parts: str) -> str:
    """Parts that open on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{''.join(parts)}</details>\n"


def chip(score: float | None, largest: float) -> str:
    """A score on green (above 0) or red, the stronger the nearer to the largest of the page."""
    if score is None:
        return ""
    color = "29, 157, 120" if score >= 0 else "205, 82, 74"
    strength = 0.08 + 0.34 * min(abs(score) / max(largest, 1e-6), 1.0)
    return (
        f'<span class="chip" style="background: rgba({color}, {strength:.2f})">{score:+.2f}</span>'
    )


def text(prompt: str, response: str) -> str:
    """A prompt in grey with its response after it, white space as it is."""
    return f'<p class="text"><i>{escape(prompt)}</i>{escape(response)}</p>'


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat

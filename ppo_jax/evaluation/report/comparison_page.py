"""evaluation.html and the table on the terminal: policies side by side, from evaluation.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.data.atomic import atomic_write
from ppo_jax.evaluation.report import comparison_plots as draw
from ppo_jax.evaluation.report.report import HALF, TEMPLATES, make_figure

# Figure -> (heading, format) of the table, in its order.
COLUMNS = {
    "score": ("score", "{:+z.2f}"),
    "kl": ("KL", "{:z.2f}"),
    "entropy": ("entropy", "{:.2f}"),
    "tokens": ("tokens", "{:.1f}"),
    "ended": ("ended", "{:.0%}"),
    "distinct1": ("distinct-1", "{:.2f}"),
    "distinct2": ("distinct-2", "{:.2f}"),
    "repetition": ("repetition", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
}

PROXY = "Proxy score"


def cell(figures: Mapping[str, Any], name: str, form: str) -> tuple[str, str]:
    """A figure and its standard error, each "" where there is none."""
    if figures.get(name) is None:
        return "", ""
    stderr = figures.get(f"{name}_stderr")
    note = "" if stderr is None else f"± {form.replace('+', '').format(stderr)}"
    return form.format(figures[name]), "at most" if name == "kl" and "kl_is" in figures else note


def columns_of(result: Mapping[str, Any]) -> list[str]:
    """The columns of which any policy has a figure."""
    rows = result["policies"].values()
    return [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]


def table(result: Mapping[str, Any]) -> str:
    """Two tables for a terminal: what is measured, and what the judges say."""
    shown = columns_of(result)
    measured = [["policy", *(COLUMNS[x][0] for x in shown)]]
    for name, row in result["policies"].items():
        cells = [" ".join(filter(None, cell(row, x, COLUMNS[x][1]))) for x in shown]
        measured.append([name, *cells])
    reference = result["settings"]["reference"]
    judged = [["judge", "policy", "mean", f"win rate over {reference}", "at equal length"]]
    for judge, of in result["judges"].items():
        for name, row in of["policies"].items():
            mean = " ".join(filter(None, cell(row, "mean", "{:+.3f}")))
            rates = [rate(row, "win_rate"), rate(row, "length_controlled_win_rate")]
            judged.append([judge, name, mean, *rates])
    tables = [aligned(rows) for rows in (measured, judged) if len(rows) > 1]
    return "\n\n".join(tables)


def rate(row: Mapping[str, Any], name: str) -> str:
    """A win rate with its interval; "" of the reference itself."""
    if name not in row:
        return ""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} ({low:.0%} to {high:.0%})"


def aligned(rows: list[list[str]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def verdict(result: Mapping[str, Any]) -> str:
    """What the first judge says of the last policy that is not the reference, in one sentence."""
    reference = result["settings"]["reference"]
    others = [name for name in result["policies"] if name != reference]
    if not result["judges"] or not others:
        return "No judge was asked, or there is no policy beside the reference."
    (judge, of), *_ = result["judges"].items()
    best = max(others, key=lambda name: of["policies"][name]["win_rate"])
    row = of["policies"][best]
    raw, fair = rate(row, "win_rate"), rate(row, "length_controlled_win_rate")
    low, high = row["win_rate_interval"]
    if low <= 0.5 <= high:
        return (
            f"No policy is clearly preferred to {reference} by {judge}: {best}, the nearest, in "
            f"{raw} of the prompts, at equal length in {fair}."
        )
    what = "is preferred to" if low > 0.5 else "is the best of those that lost to"
    return (
        f"{best} {what} {reference} in {raw} of the prompts by {judge}; at equal length in {fair}."
    )


def write_page(result: Mapping[str, Any], path: Path) -> Path:
    """Write the page, one file with its style and figures inside; returns its path."""
    settings, shown = result["settings"], columns_of(result)
    colors = draw.policy_colors(list(result["policies"]))
    text = TEMPLATES.get_template("comparison.html.jinja").render(
        name=path.resolve().parent.name,
        verdict=verdict(result),
        settings=settings,
        cards=cards(result),
        figures=figures(result, colors),
        headings=["policy", *(COLUMNS[x][0] for x in shown)],
        rows=[
            (name, colors[name], [cell(row, x, COLUMNS[x][1]) for x in shown])
            for name, row in result["policies"].items()
        ],
        judges=judge_tables(result),
        samples=result["samples"],
        colors=colors,
        best_of_n=bool(result["best_of_n"]),
    )
    atomic_write(path, text)
    return path


def cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, what it is, with what): the win rate of every policy by the first judge."""
    if not result["judges"]:
        return []
    (judge, of), *_ = result["judges"].items()
    reference = result["settings"]["reference"]
    return [
        (
            f"{row['win_rate']:.1%}",
            f"{name} over {reference}, by {judge}",
            f"at equal length {row['length_controlled_win_rate']:.1%}",
        )
        for name, row in of["policies"].items()
        if "win_rate" in row
    ][:6]


def figures(result: Mapping[str, Any], colors: Mapping[str, str]) -> list[Any]:
    """Win rates by every judge, each beside its mean against the KL; the proxy score last."""
    reference, found = result["settings"]["reference"], []
    dots = "Dots: share of prompts, ties half; diamonds: at equal length. Lines: 95% intervals."
    means = "Mean with its 95% interval; the KL of best-of-n is an upper bound."
    for title, points, curve in scores_against_kl(result):
        if title in result["judges"]:
            drawn = draw.win_rates(result["judges"][title]["policies"], colors)
            found.append(make_figure(f"Over {reference}, by {title}", drawn, dots, size=HALF))
        drawn = draw.against_kl(points, curve, colors, "mean score")
        found.append(make_figure(f"{title} against KL", drawn, means, size=HALF))
    return [figure for figure in found if figure]


def scores_against_kl(result: Mapping[str, Any]) -> list[tuple[str, dict, dict]]:
    """(title, {policy: (KL, mean, standard error)}, the curve of best-of-n) of every score."""
    policies, reference = result["policies"], result["settings"]["reference"]
    kls = {name: row["kl"] for name, row in policies.items() if row.get("kl") is not None}
    pool = result["best_of_n"].get(reference)
    named = [(judge, of["policies"], "mean") for judge, of in result["judges"].items()]
    named.append((PROXY, policies, "score"))
    found = []
    for title, rows, key in named:
        points = {
            name: (kl, rows[name][key], rows[name].get(f"{key}_stderr") or 0.0)
            for name, kl in kls.items()
            if key in rows[name]
        }
        curve = {}
        if pool:
            values = pool["score"] if title == PROXY else pool["judges"][title]
            stderr = [x or 0.0 for x in values["stderr"]]
            curve = {"kl": pool["kl_bound"], "mean": values["mean"], "stderr": stderr}
        found.append((title, points, curve))
    return found


def judge_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table a judge: its name, what is known of it, and a row a policy."""
    tables = []
    for judge, of in result["judges"].items():
        accuracy = of.get("pair_accuracy_margin1")
        about = [of["note"]] if "note" in of else []
        about += [f"right on {accuracy:.1%} of rated pairs"] if accuracy is not None else []
        rows = [
            (name, cell(row, "mean", "{:+.3f}"), *(rate(row, x) for x in RATES))
            for name, row in of["policies"].items()
        ]
        tables.append({"name": judge, "about": "; ".join(about), "rows": rows})
    return tables


RATES = ("win_rate", "length_controlled_win_rate")

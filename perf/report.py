"""From the JSON of run.py to the README's section on speed, and to a chart.

python perf/report.py perf/results.json                                  the section, printed
python perf/report.py perf/results.json --readme README.md               the same, between the README's markers
python perf/report.py perf/zen5.json perf/results.json --readme README.md      and folded below, another run's
python perf/report.py perf/results.json --plot perf/speed.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
OURS = "ours"
# Column -> the peers of which the fastest counts.
RIVALS = {
    "PyTorch": ("torch",),
    "flex_attention": ("flex",),
    "ONNX Runtime": ("onnx_mha", "onnx_attention", "onnx_gqa"),
    "JAX": ("jax",),
    "NumPy": ("numpy",),
}
NAMES = {
    "ours": "numba_attn",
    "torch": "PyTorch",
    "flex": "PyTorch `flex_attention`",
    "onnx_mha": "ONNX Runtime `MultiHeadAttention`",
    "onnx_attention": "ONNX Runtime `Attention`",
    "onnx_gqa": "ONNX Runtime `GroupQueryAttention`",
    "jax": "JAX",
    "numpy": "NumPy",
}
NONE = "–"
BFLOAT16 = {"amx": "AMX tiles", "dot": "dot products of pairs", "widened": "as float32"}

# Forms of a case, by what the driver calls them, of which the first takes so many times as long as the second; and
# whether that is to be more than 1.
COMPARED = (
    ("bfloat16 / int8", "ours bfloat16", "ours int8", True),
    ("bfloat16 / int4", "ours bfloat16", "ours int4", True),
    ("float32 / bfloat16", "ours float32", "ours bfloat16", True),
    ("ONNX Runtime's int8 / ours, of float32", "onnx_gqa int8", "ours int8 float32", True),
    ("its int4 / ours", "onnx_gqa int4", "ours int4 float32", True),
    ("pages of 16 tokens / contiguous", "ours paged", "ours float32", False),
    ("with a mask_mod / without", "ours masked", "ours float32", False),
    ("with key_weight / without", "ours weights", "ours float32", False),
    ("tree / one token", "ours", "ours token", False),
    ("its mask as a function / as an array", "ours function", "ours", False),
    ("a call for each / packed", "ours loop", "ours varlen", True),
    ("padded / packed", "ours padded", "ours varlen", True),
    ("padded with lengths / packed", "ours", "ours varlen", True),
    ("PyTorch, a call for each / packed", "torch loop", "ours varlen", True),
    ("PyTorch, padded / packed", "torch padded", "ours varlen", True),
    ("PyTorch's layer / ours", "torch layer", "ours layer", True),
    ("diagnosis / attention", "ours diagnose", "ours", False),
)

Result = dict[str, Any]
Row = Sequence[str]


# Numbers --------------------------------------------------------------------------------------------------------------


def seconds(case: Result, peers: Iterable[str] = (OURS,)) -> float | None:
    """The fastest of some peers; None if none of them can do the case."""
    times = [case["peers"][name]["median"] for name in peers if "median" in case["peers"].get(name, {})]
    return min(times, default=None)


def ratio(case: Result, rival: str) -> float | None:
    """How many times as long as ours the rival takes."""
    ours, theirs = seconds(case), seconds(case, RIVALS[rival])
    return None if ours is None or theirs is None else theirs / ours


def ratios(cases: Iterable[Result], rival: str) -> dict[str, float]:
    """Of the cases that the rival can do, by name."""
    found = {case["name"]: ratio(case, rival) for case in cases}
    return {name: value for name, value in found.items() if value is not None}


def rivals(cases: Iterable[Result]) -> list[str]:
    """Those that were measured."""
    cases = list(cases)
    return [rival for rival in RIVALS if ratios(cases, rival)]


def geometric_mean(values: Iterable[float]) -> float:
    """As of speeds and ratios.

    >>> geometric_mean([1, 4])
    2.0
    """
    values = list(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def of_form(case: Result, form: str, twin: Result | None) -> float | None:
    """How many times as long as the case the same arrays take in another form, timed in the same turns.

    Of a run that has not timed it, a case like it, timed minutes before or after.
    """
    other = case["peers"].get(f"{OURS} {form}", {}).get("median")
    if other is None:
        return over_ours(twin, case)
    return float(other / case["peers"][OURS]["median"])


def plain_twin(case: Result, cases: Iterable[Result]) -> Result | None:
    """The case of the same size with nothing masked and no shared heads; None if there is none, or it is the case."""

    def size(one: Result) -> tuple[Any, ...]:
        shape = one["shape"]
        return one["dtype"], *(shape[name] for name in ("B", "Hq", "Lq", "Lk", "D", "Dv"))

    for other in cases:
        plain = other["mask"] is None and not other["options"] and other["shape"]["Hkv"] is None
        if plain and size(other) == size(case):
            return None if other["name"] == case["name"] else other
    return None


def float32_twin(case: Result, cases: Iterable[Result]) -> Result | None:
    """The same case of float32; None if there is none, or it is the case."""

    def problem(one: Result) -> tuple[Any, ...]:
        return one["shape"], one["mask"], one["options"]

    if case["dtype"] == "float32":
        return None
    return next((one for one in cases if one["dtype"] == "float32" and problem(one) == problem(case)), None)


# Text -----------------------------------------------------------------------------------------------------------------


def sections(first: Result, others: Iterable[Result]) -> str:
    """All of the README's section, without its markers: what was measured first, and folded, elsewhere."""
    parts = [section(first)]
    for other in others:
        title = f"The same on {machine_of(other)}, {commit_of(other)}"
        parts.append(f"<details>\n<summary>{title}</summary>\n\n{section(other)}\n\n</details>")
    return "\n\n".join(parts)


def machine_of(results: Result) -> str:
    machine = results["environment"]
    return f"{machine['cpu']} ({machine['compiled_for']}, {machine['isa']})"


def commit_of(results: Result) -> str:
    """What was measured, and when."""
    machine, parts = results["environment"], []
    if machine["commit"]:
        parts.append(f"commit {machine['commit'][:10]}{' with changes' if machine['dirty'] else ''}")
    return ", ".join([*parts, machine["date"][:10]])


def section(results: Result) -> str:
    """Of one run, all tables."""
    cases = results["cases"]
    parts = [
        main_table("heads x length, head size", tagged(cases, "table")),
        overhead_table("other forms", untagged(cases), cases),
        *by_dtype(tagged(cases, "narrow"), lambda dtype, some: main_table(dtype, some, cases)),
        overhead_table("variants", tagged(cases, "variant"), cases),
    ]
    lines = accuracy_lines(cases) + window_lines(cases) + documents_lines(cases, results["extras"])
    lines += extra_lines(results["extras"]) if results["extras"] else []
    parts.append("\n".join(f"* {line}" for line in lines))
    parts.append(environment_sentence(results))
    parts += gradients(cases)
    parts += decoding(cases)
    return "\n\n".join(part for part in parts if part)


def gradients(cases: Sequence[Result]) -> list[str]:
    """Forward and backward passes together, and backward alone, which does five products to the forward's two.

    Those with a mask, whose gradient is wanted too, come last.
    """
    found = [case for case in cases if "median" in case["peers"].get("ours backward", {})]
    if not found:
        return []
    head = ["", "forward and backward, ms", "PyTorch / ours", "backward, ms", "GFLOP/s", "of peak", "PyTorch / ours"]
    rows: list[Row] = []
    masked = untagged(found)
    for dtype in dict.fromkeys(case["dtype"] for case in found):
        rows += _gradients_of([case for case in found if case["dtype"] == dtype and case not in masked])
    rows += _gradients_of(masked)
    lines = [f"* {line}" for case in tagged(cases, "table") for line in comparisons(case)]
    return ["### Gradients, layers, diagnosis", table(head, rows), "\n".join(lines)]


def _gradients_of(cases: Sequence[Result]) -> list[Row]:
    ours, theirs = ({n: f"{peer} {n}" for n in ("gradient", "backward")} for peer in (OURS, "torch"))
    rows: list[Row] = []
    faster: dict[str, list[float]] = {"gradient": [], "backward": []}
    for case in cases:
        row = [case["name"]]
        for name, values in faster.items():
            mine = case["peers"][ours[name]]
            row.append(milliseconds(mine["median"]))
            if name == "backward":
                rate = 2.5 * mine["gflops"]
                row += [f"{rate:.0f}", f"{100 * rate / case['peak_gflops']:.0f} %"]
            other = case["peers"].get(theirs[name], {}).get("median")
            row.append(times(None if other is None else other / mine["median"]))
            values += [] if other is None else [other / mine["median"]]
        rows.append(row)
    for name, summarise in (("*geometric mean*", geometric_mean), ("*least*", min)) if len(cases) > 1 else ():
        both = [times(summarise(values)) if values else NONE for values in faster.values()]
        rows.append([name, "", both[0], "", "", "", both[1]])
    return rows


def decoding(cases: Sequence[Result]) -> list[str]:
    """What is bound by reading keys and values, as decoding is, and what else caches and batches may look like."""
    found = tagged(cases, "decode")
    speed: dict[str, Callable[[Result], str]] = {
        "GB/s": lambda case: f"{case['peers'][OURS]['gb_per_s']:.1f}",
        "of reading": lambda case: f"{100 * case['fraction_of_read']:.0f} %",
    }
    title = "query / key-value heads x keys, head size"
    tables = by_dtype(found, lambda dtype, some: main_table(f"{dtype}, {title}", some, speed=speed))
    lines = [f"* {line}" for case in tagged(cases, "cache") for line in comparisons(case)]
    if not tables and not lines:
        return []
    parts = ["### Decoding"]
    if tables:
        text = 'One new token attends to a cache: GB/s are of keys and values, and "of reading" is against a sum of '
        text += f"the same arrays by all threads, measured in the same turns ({reading_range(cases)} GB/s)."
        parts += [text, *tables]
    return [*parts, "\n".join(lines)]


def by_dtype(cases: Sequence[Result], tell: Callable[[str, list[Result]], str]) -> list[str]:
    """A text for the cases of each type."""
    dtypes = dict.fromkeys(case["dtype"] for case in cases)
    return [tell(dtype, [case for case in cases if case["dtype"] == dtype]) for dtype in dtypes]


def reading_range(cases: Iterable[Result]) -> str:
    """Slowest to fastest."""
    rates = [case["read_gb_per_s"] for case in cases if "read_gb_per_s" in case]
    return " to ".join(dict.fromkeys(f"{rate:.0f}" for rate in (min(rates), max(rates))))


def comparisons(case: Result) -> list[str]:
    """One line, of the forms of a case that were measured."""
    parts = []
    for text, first, second, gain in COMPARED:
        found = [case["peers"].get(name, {}).get("median") for name in (first, second)]
        if None not in found:
            value = found[0] / found[1]
            parts.append(f"{text} {times(value) if gain else f'{value:.2f}'}")
    return [f"{case['name']}, how many times as long: {', '.join(parts)}."] if parts else []


def tagged(cases: Iterable[Result], tag: str) -> list[Result]:
    """The rows of one table."""
    return [case for case in cases if tag in case["tags"]]


def untagged(cases: Iterable[Result]) -> list[Result]:
    """The rows of no other table."""
    return [case for case in cases if not {"table", "narrow", "variant", "decode", "cache"} & set(case["tags"])]


def table(head: Row, rows: Iterable[Row]) -> str:
    """Markdown, the first column aligned left and the others right."""
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))


SPEED: dict[str, Callable[[Result], str]] = {
    "GFLOP/s": lambda case: f"{case['peers'][OURS]['gflops']:.0f}",
    "of peak": lambda case: f"{100 * case['fraction_of_peak']:.0f} %",
}


def main_table(
    title: str,
    cases: Sequence[Result],
    of_float32: Sequence[Result] = (),
    speed: dict[str, Callable[[Result], str]] = SPEED,
) -> str:
    """Our time and speed, and the time of others divided by ours; in bold what we lose.

    Another column has the time of the same problem in float32, where that is among `of_float32`, divided likewise.
    """
    if not cases:
        return ""
    columns = rivals(cases)
    head = ["ms", *speed, *(f"{name} / ours" for name in (*(["float32"] * bool(of_float32)), *columns))]
    rows = [
        [
            name_of(case, columns),
            milliseconds(case["peers"][OURS]["median"]),
            *(tell(case) for tell in speed.values()),
            *([times(of_form(case, "as float32", float32_twin(case, of_float32)))] if of_float32 else []),
            *(times(ratio(case, rival)) for rival in columns),
        ]
        for case in cases
    ]
    found = {rival: ratios(cases, rival) for rival in columns}
    summaries: dict[str, Callable[[Iterable[float]], float]] = {"geometric mean": geometric_mean, "least": min}
    for name, summarise in summaries.items():
        empty = [""] * (len(head) - len(columns))
        rows.append([f"*{name}*", *empty, *(times(summarise(found[rival].values())) for rival in columns)])
    return f"{table([title, *head], rows)}\n\n{worst_sentence(found)}".rstrip()


def name_of(case: Result, columns: Iterable[str]) -> str:
    """In bold if a rival is faster."""
    return bold(case["name"], any((ratio(case, rival) or 1) < 1 for rival in columns))


def over_ours(other: Result | None, case: Result) -> float | None:
    """Our time of another case, divided by that of this one."""
    return None if other is None else other["peers"][OURS]["median"] / case["peers"][OURS]["median"]


def worst_sentence(found: dict[str, dict[str, float]]) -> str:
    """The case in which each rival comes closest, or wins."""
    parts = [f"{rival} at {name} ({times(found[rival][name])})" for rival in found for name in [worst(found[rival])]]
    return f"The least favourable rows: {', '.join(parts)}." if parts else ""


def worst(values: dict[str, float]) -> str:
    return min(values, key=values.__getitem__)


def overhead_table(title: str, cases: Sequence[Result], all_cases: Sequence[Result]) -> str:
    """What masks, windows, lengths, shared heads and variants cost against the case without."""
    if not cases:
        return ""
    columns = rivals(cases)
    head = [title, "ms", "time / plain", *(f"{rival} / ours" for rival in columns)]
    rows = []
    for case in cases:
        plain = of_form(case, "plain", plain_twin(case, all_cases))
        rows.append(
            [
                name_of(case, columns),
                milliseconds(case["peers"][OURS]["median"]),
                NONE if plain is None else f"{1 / plain:.2f}",
                *(times(ratio(case, rival)) for rival in columns),
            ]
        )
    return table(head, rows)


def milliseconds(value: float) -> str:
    """Three digits.

    >>> milliseconds(0.0123456), milliseconds(2.5), milliseconds(5.6e-6)
    ('12.3', '2500', '0.0056')
    """
    value *= 1e3
    decimals = max(0, min(4, 2 - math.floor(math.log10(value))))
    return f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """A ratio, in bold below 1.

    >>> times(1.234), times(0.5), times(0.996), times(41.2), times(None)
    ('1.23', '**0.50**', '**0.996**', '41', '–')
    """
    if value is None:
        return NONE
    if value < 1:
        return bold(f"{value:.3f}" if value >= 0.995 else f"{value:.2f}")
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def bold(text: str, wanted: bool = True) -> str:
    return f"**{text}**" if wanted else text


def accuracy_lines(cases: Sequence[Result]) -> list[str]:
    """Errors against float64, of each type: the largest of all cases, and the mean of root mean squares."""
    lines = []
    for dtype in ("float32", "bfloat16", "float16"):
        errors: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, "torch")}
        for case in cases:
            if case["dtype"] == dtype and all("error" in case["peers"].get(name, {}) for name in errors):
                for name, found in errors.items():
                    found.append(case["peers"][name]["error"])
        parts = [
            f"{NAMES[name]} {max(e['max'] for e in found):.1e} at most, "
            f"{geometric_mean(e['rms'] for e in found):.1e} root mean square"
            for name, found in errors.items()
            if found
        ]
        if parts:
            lines.append(f"Error of {dtype} results against float64, over {len(found)} cases: {'; '.join(parts)}.")
    return lines


def window_lines(cases: Sequence[Result]) -> list[str]:
    """What a window saves."""
    gains = {case["name"]: of_form(case, "full causal", None) for case in cases if case["options"].get("window")}
    return [f"{name}: {gain:.1f} times as fast as every earlier key." for name, gain in gains.items() if gain]


def documents_lines(cases: Sequence[Result], extras: Result | None) -> list[str]:
    """What a block mask saves, and what it costs to make."""
    found = [case for case in cases if case["options"].get("documents")]
    if not found:
        return []
    case, text = found[0], ""
    if gain := of_form(case, "plain", plain_twin(case, cases)):
        text = f" {gain:.1f} times as fast as with every key"
    cost = (extras or {}).get("block_mask_seconds")
    if cost:
        text += (
            f"{';' if text else ''} making the block mask takes {milliseconds(cost['again'])} ms, "
            f"{100 * cost['again'] / cost['call']:.0f} % of that call, and {cost['first']:.1f} s the first time, when "
            "its function is compiled"
        )
    return [f"{case['name']}:{text}."] if text else []


def extra_lines(extras: Result) -> list[str]:
    """Fixed cost, first call, memory."""
    fixed, cold, warm = extras["fixed_cost_us"], extras["start_seconds"]["cold"], extras["start_seconds"]["warm"]
    again = f"; {fixed['again']:.1f} µs where a call like it has come before" if "again" in fixed else ""
    return [
        f"Fixed cost of a call (1 head, 1 query, 64 keys): {fixed['call']:.1f} µs, of which validation "
        f"{fixed['validation']:.1f} µs and launch {fixed['launch']:.1f} µs{again}.",
        f"`import numba_attn`: {1e3 * warm['import']:.1f} ms on top of NumPy. The first call in a process: "
        f"{warm['backend'] + warm['first_call']:.2f} s, of which {warm['backend']:.2f} s import Numba; "
        f"{cold['backend'] + cold['first_call']:.1f} s where no compiled kernel is on disk yet.",
        *(memory_line(case, taken) for case, taken in extras["memory_bytes"].items()),
        *(process_line(layer, found) for layer, found in extras["in_process"].items()),
    ]


def memory_line(case: str, taken: Result) -> str:
    """Working memory of everyone that could tell."""
    parts = [f"{NAMES[name]} {megabytes(size)}" for name, size in taken.items() if isinstance(size, int)]
    return f"Memory that one call takes beyond its arrays, {case}: {', '.join(parts)}."


def process_line(layer: str, found: Result) -> str:
    """What calls on one threading layer cost the rest of the process."""
    return (
        f"Threading layer {layer}: 8 threads of 50 calls each, all at once, take {found['at_once']:.2f} times as long "
        f"as the same calls one after the other; another thread is held up for {1e3 * found['gap']:.0f} ms at most; "
        f"Ctrl-C is seen after {found['interrupt']:.1f} s."
    )


def megabytes(size: int) -> str:
    """The kernel counts resident pages to about a megabyte.

    >>> megabytes(123_456), megabytes(12_345_678)
    ('under 1 MB', '12 MB')
    """
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else "under 1 MB"


def environment_sentence(results: Result) -> str:
    """What was measured, on what, how."""
    machine, settings, peak = results["environment"], results["settings"], results["peak"]
    packages = ("numba", "numpy", "torch", "onnxruntime", "jax")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in packages if name in machine["versions"])
    peaks = f"{peak['gflops']['float32']:.0f} GFLOP/s in float32 and {peak['gflops']['float64']:.0f} in float64"
    if "bfloat16" in peak["gflops"]:
        peaks += f", {peak['gflops']['bfloat16']:.0f} in bfloat16 ({BFLOAT16[machine['bfloat16']]})"
    return (
        f"float32 unless said otherwise, {settings['threads']} threads of {machine_of(results)}, "
        f"whose measured peak is {peaks}, "
        f"reading memory at {peak['read_gb_per_s']:.0f} GB/s{peak_range(results['cases'])}. "
        f"Medians of {settings['repeats']} interleaved repeats, every library in a process of its own, ONNX Runtime by "
        "the fastest of its operators, NumPy by the formula written down; causal and documents count only the pairs "
        f"that are attended to. {versions}, Python {machine['python']}; {commit_of(results)}."
    )


def peak_range(cases: Iterable[Result]) -> str:
    """What the same peak was in the turns of single cases, where that tells of others on the processor."""
    peaks = [case["peak_gflops"] for case in cases if case["dtype"] == "float32"]
    if min(peaks) > 0.8 * max(peaks):
        return ""
    return (
        f"; in the turns of single cases the float32 peak was {min(peaks):.0f} to {max(peaks):.0f}, as others use the "
        "processor too, so that no row is exact"
    )


def rewrite(readme: Path, text: str) -> None:
    """Put `text` between the markers."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} lacks {BEGIN} and, after it, {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


# Chart ----------------------------------------------------------------------------------------------------------------

# Bar -> the peers of which the fastest counts, and a colour.
BARS = {
    "numba_attn": ((OURS,), "#c8501e"),
    "PyTorch": (RIVALS["PyTorch"], "#7a8ca0"),
    "ONNX Runtime": (RIVALS["ONNX Runtime"], "#c3ccd6"),
}
CAUSAL = ", causal"


def plot(results: Result, path: Path) -> None:
    """GFLOP/s of float32 cases: without a mask on the left, causal on the right."""
    from matplotlib.figure import Figure

    cases = [case for case in results["cases"] if "table" in case["tags"] and case["dtype"] == "float32"]
    labels = list(dict.fromkeys(case["name"].removesuffix(CAUSAL) for case in cases))
    panels = {
        title: {case["name"].removesuffix(CAUSAL): case for case in cases if case["name"].endswith(CAUSAL) == causal}
        for title, causal in (("every key", False), ("causal", True))
    }
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, (title, found) in zip((left, right), panels.items(), strict=True):
        draw_panel(axes, [found.get(label) for label in labels], results["peak"]["gflops"]["float32"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("GFLOP/s, more is better", fontsize=9)
    left.set_yticks(range(len(labels)), labels)
    left.set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle("Attention in float32: heads x length, head size", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=200)


def draw_panel(axes: Any, cases: Sequence[Result | None], peak: float) -> None:
    """A group of bars for each case, and a line at the peak; a case that is None leaves a gap."""
    height = 0.8 / len(BARS)
    for i, (label, (peers, colour)) in enumerate(BARS.items()):
        speeds = [gflops(case, peers) for case in cases]
        at = [row + (i - (len(BARS) - 1) / 2) * height for row in range(len(cases))]
        axes.barh(at, speeds, height, label=label, color=colour)
    axes.axvline(peak, color="black", linewidth=1, linestyle="--", label="peak of the processor")
    axes.tick_params(labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def gflops(case: Result | None, peers: Iterable[str]) -> float:
    time = None if case is None else seconds(case, peers)
    return 0.0 if case is None or time is None else float(case["flop"] / time / 1e9)


# The command ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="JSON written by run.py")
    parser.add_argument("others", type=Path, nargs="*", help="the same of other runs, to be folded below it")
    parser.add_argument("--readme", type=Path, help=f"rewrite what is between {BEGIN} and {END} in this file")
    parser.add_argument("--plot", type=Path, help="draw a chart into this file")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    if options.plot:
        plot(results, options.plot)
        if not options.readme:
            return
    text = sections(results, (json.loads(path.read_text()) for path in options.others))
    if options.readme:
        rewrite(options.readme, text)
    else:
        print(text)


if __name__ == "__main__":
    main()

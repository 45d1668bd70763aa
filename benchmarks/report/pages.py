"""Every generated page: what is on it, and whether it is up to date. No number is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments import ALL
from benchmarks.measure import results_file
from benchmarks.report import targets
from benchmarks.report.allocators import allocator_table, large_input_table
from benchmarks.report.blocks import against_the_better, slow_rows, summary_table, workload_tables
from benchmarks.report.converted import converted_table
from benchmarks.report.depthwise import block_table, depthwise_table, every_convolution
from benchmarks.report.gpu import every_row, gpu_parts, gpu_target_table
from benchmarks.report.imports import import_lines
from benchmarks.report.networks import fused_table, network_table
from benchmarks.report.stages import stage_tables
from benchmarks.report.tails import tail_table
from benchmarks.report.whole_networks import BATCH, speedup_table, whole_network_spreads, whole_network_tables
from benchmarks.summary import Row, groups, row_key

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "docs/images"
WRITTEN = "<!-- Written by `make readme` from benchmarks/results. Change the results or benchmarks/report. -->"
DISTURBED = 0.1

Results = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The content of results files under their names, and the rows of each kind of all of them."""

    files: Mapping[str, Results]

    def of_kind(self, kind: str) -> list[Results]:
        return [results for results in self.files.values() if results["kind"] == kind]

    def rows(self, kind: str, judged: bool = False) -> list[Row]:
        """Each row once; with `judged` without those of quick runs, whose times mean nothing. Raises ValueError where
        two files have the same row."""
        found: dict[tuple[Any, ...], Row] = {}
        for results in self.of_kind(kind):
            for row in results["rows"] if not (judged and is_quick(results)) else []:
                key = (row.get("environment"), *row_key(row))
                if key in found:
                    raise ValueError(f"{kind}: more than one file has {' '.join(map(str, row_key(row)))}")
                found[key] = row
        return list(found.values())

    def judged(self) -> dict[str, list[Row]]:
        """What the CPU's targets speak of."""
        kinds = ("blocks", "networks", "allocators", "tails", "whole_networks", "converted", "depthwise", "imports")
        return {kind: self.rows(kind, judged=True) for kind in kinds}

    @property
    def gpu(self) -> Results | None:
        return next(iter(self.of_kind("gpu")), None)


def is_quick(results: Results) -> bool:
    quick: bool = results["settings"]["quick"]
    return quick


# ---- parts of pages, each empty where nothing was measured ----


def _if(rows: Sequence[Row], *made: Callable[[Sequence[Row]], str]) -> list[str]:
    return [text for make in made if rows and (text := make(rows))]


def summaries(measured: Measured) -> dict[str, list[str]]:
    """By title, the short tables of each question."""
    blocks, networks = measured.rows("blocks"), measured.rows("networks")
    return {
        "Every network": _if(measured.rows("whole_networks"), whole_network_tables),
        "Converted networks": _if(measured.rows("converted"), converted_table),
        "The block by itself": _if(blocks, summary_table, slow_rows),
        "The block with what stands around it": _if(measured.rows("tails"), tail_table),
        "Depthwise convolutions": _if(measured.rows("depthwise"), depthwise_table, block_table),
        "Time and memory of a training step": _if(networks, fused_table),
        "Large inputs": _if(measured.rows("allocators"), allocator_table),
        "The import": _if(measured.rows("imports"), import_lines),
    }


def disturbed(measured: Measured) -> list[str]:
    """A warning where other programs took CPU time from the benchmark."""
    rows = [row for results in measured.files.values() for row in results["rows"]]
    shares = [share for row in rows if (share := row["other_cpu_share"] or 0) > DISTURBED]
    if not shares:
        return []
    return [
        f"**Not to be trusted**: during {len(shares)} of {len(rows)} rows other programs used more than "
        f"{DISTURBED:.0%} of the CPUs, {max(shares):.0%} at most."
    ]


def origin(results: Results, name: str) -> str:
    """The machine, the versions, the commit and the notes of a results file, as an item of a list."""
    machine, software, git = results["machine"], results["software"], results["git"]
    gpu = results.get("gpu")
    facts = [
        f"`{name}`: {machine['gpu'] or machine['cpu']}",
        *([f"CUDA {gpu['cuda']}"] if gpu else [f"{machine['threads']} threads", f"instruction set {machine['isa']}"]),
        *(f"{package} {software[package]}" for package in ("torch", "timm") if package in software),
        *(f"{package} {version}" for package, version in results.get("runtimes", {}).items()),
        f"commit {(git['commit'] or 'none')[:10]}{' + changes' if git['dirty'] else ''}",
        results["date"][:10],
    ]
    quick = ["**a quick run, whose times mean nothing**"] if is_quick(results) else []
    # The rows of a GPU that failed are in its tables.
    failed = [] if gpu else [f"not timed: {what}" for what in results.get("failed", [])]
    notes = [f"{note[0].upper()}{note[1:]}." for note in [*quick, *results["notes"], *failed]]
    return " ".join([f"- {', '.join(facts)}.", *notes])


def origins(measured: Measured) -> str:
    return "\n".join(origin(results, name) for name, results in measured.files.items())


def methods(measured: Measured) -> list[str]:
    """How each kind of results file was measured, in the words of the file."""
    found: dict[str, list[str]] = {}
    for name, results in measured.files.items():
        found.setdefault(results.get("method", ""), []).append(f"`{name}`")
    return [f"{', '.join(names)}: {method}" for method, names in found.items() if method]


# ---- the pages ----


def tables(results: Results, name: str) -> str:
    """What a run prints: its tables, its rows and where they come from."""
    measured = Measured({name: results})
    long = [text for page in QUESTIONS for text in page.parts(measured)]
    gpu = gpu_parts(results) if measured.gpu else []
    short = [text for parts in summaries(measured).values() for text in parts]
    parts = [*dict.fromkeys([*gpu, *short, *long]), *disturbed(measured)]
    return "\n\n".join([*parts, origin(results, name)])


def readme(measured: Measured) -> str:
    """The speed of whole networks and of the block in ten rows at most, and what they were measured on."""
    kind = "converted" if measured.rows("converted", judged=True) else "whole_networks"
    networks = [
        row for row in measured.rows(kind, judged=True) if row["batch"] == BATCH and row.get("layout", "nhwc") == "nhwc"
    ]
    blocks = measured.rows("blocks", judged=True)
    parts = [speedup_table(networks, blocks)]
    for results in measured.of_kind(kind) if networks else []:
        machine, torch = results["machine"], results["software"]["torch"]
        sizes = " and ".join(f"{size}×{size}" for (size,) in groups(networks, "image_size"))
        parts.append(
            f"Median times on {machine['threads']} cores of an {machine['cpu']} ({machine['isa']}), torch {torch}, "
            f"float32, channels_last, batch {BATCH}, images of {sizes}: timm's networks, without and with "
            f"{'a call of `se_ext.convert`' if kind == 'converted' else 'se_ext in the place of their SE blocks'}."
        )
    if blocks:
        models = {use["model"] for row in blocks for use in row["workload"]["uses"]}
        isas = " and ".join(dict.fromkeys(results["machine"]["isa"] for results in measured.of_kind("blocks")))
        parts.append(
            f"The block alone ({isas}): geometric means over the SE blocks of {len(models)} networks in both layouts "
            f"at batch {BATCH}; speed-up over the better eager form, and of se_ext in eager mode over the better "
            "compiled form."
        )
    return "\n\n".join(parts)


def benchmarks(measured: Measured) -> list[str]:
    pictures = [f"![{words}](images/{name}.png)" for name, words in PICTURES.items()]
    answered = [page for page in QUESTIONS if page.parts(measured)]
    links = [f"- [{page.title}]({page.path.removeprefix('docs/')})" for page in answered]
    return [
        "How fast is se_ext, and how was that measured? The [targets](targets.md) say what is required of it; "
        "[the page about GPUs](gpu.md) has what is known of one.",
        "## Whole networks and the block",
        readme(measured),
        *(part for title, parts in summaries(measured).items() if parts for part in [f"## {title}", *parts]),
        *disturbed(measured),
        "## Every row",
        "\n".join(links),
        "## Pictures",
        *pictures,
        "## How it was measured",
        "`make bench` measures everything here again; `python -m benchmarks` lists the experiments. Each results file "
        "holds the samples of every round, the machine, the versions and the commit:",
        origins(measured),
        *methods(measured),
    ]


def target_page(measured: Measured) -> list[str]:
    parts = [
        "What is required of se_ext's speed, what is aimed at, and what was measured. For maintainers. The "
        "[record of tuning](tuning.md) has the reasons for what is missed, as far as they are known.",
        targets.cpu_table(measured.judged()),
    ]
    for target, below in targets.rows_below(measured.judged()):
        lines = "\n".join(against_the_better(row, target.baseline) for row in below) or "None."
        parts += [f"Rows below {target.required:g}, what every row must have: {len(below)}", lines]
    for target, networks in targets.networks_below(measured.judged()):
        lines = "\n".join(f"- {targets.network_line(found)}" for found in networks) or "None."
        parts += [f"Networks below {target.required:g} of the target “{target.title}”: {len(networks)}", lines]
    return [*parts, "## On a GPU", gpu_target_table(measured.gpu)]


def blocks_in(mode: str) -> Callable[[Measured], list[str]]:
    return lambda measured: workload_tables([row for row in measured.rows("blocks") if row["mode"] == mode])


@dataclass(frozen=True)
class Page:
    path: str
    title: str
    parts: Callable[[Measured], list[str]]


# One question a page, with every row that answers it.
QUESTIONS = (
    Page(
        "docs/results/whole-networks.md",
        "What do whole networks take, without and with se_ext?",
        lambda m: _if(m.rows("whole_networks"), whole_network_spreads),
    ),
    Page("docs/results/inference.md", "What does an SE block take in inference?", blocks_in("inference")),
    Page("docs/results/training.md", "What does an SE block take forward and backward?", blocks_in("train")),
    Page(
        "docs/results/tails.md",
        "What does an SE block take together with what stands around it?",
        lambda m: [*_if(m.rows("tails"), tail_table), *workload_tables(m.rows("tails"))],
    ),
    Page(
        "docs/results/depthwise.md",
        "What does a depthwise convolution take?",
        lambda m: every_convolution(m.rows("depthwise")),
    ),
    Page(
        "docs/results/networks.md",
        "What does SE cost in a whole network?",
        lambda m: _if(m.rows("networks"), network_table, fused_table),
    ),
    Page(
        "docs/results/large-inputs.md",
        "What do inputs larger than 64 MB take, by the allocator's settings?",
        lambda m: _if(m.rows("allocators"), allocator_table, large_input_table),
    ),
    Page("docs/results/stages.md", "What bounds the speedup of the block?", lambda m: stage_tables(m.rows("stages"))),
    Page("docs/results/gpu.md", "What does the block take on a GPU?", lambda m: every_row(m.gpu) if m.gpu else []),
)
PAGES = (
    Page("docs/benchmarks.md", "Benchmarks", benchmarks),
    Page("docs/targets.md", "Targets", target_page),
    *QUESTIONS,
)
# Between <!-- name:begin --> and <!-- name:end --> of a page that is otherwise written by hand.
REGIONS: dict[str, tuple[str, Callable[[Measured], str]]] = {
    "README.md": ("speed", readme),
    "docs/gpu.md": ("gpu", lambda measured: "\n\n".join(gpu_parts(measured.gpu))),
}
PICTURES = {
    **{
        f"{kind}-{dtype}-batch{batch}": f"{words}, {dtype}, batch {batch}"
        for dtype, batch in (("float32", 1), ("float32", 8), ("float32", 32), ("bfloat16", 8))
        for kind, words in {
            "speedup": "Speedup of se_ext over the better of eager PyTorch and torch.compile, for every SE block",
            "roofline": "Time of every SE block against the bytes of its input",
        }.items()
    },
    "networks-float32": "Whole networks as they are, with se_ext, and without SE",
}


def render(measured: Measured, root: Path) -> dict[Path, str]:
    """What every generated page has to say; of a question that nobody measured there is none. Raises ValueError where a
    page lacks its markers."""
    found = {
        root / page.path: "\n\n".join([WRITTEN, f"# {page.title}", *parts]) + "\n"
        for page in PAGES
        if (parts := page.parts(measured))
    }
    for path, (name, make) in REGIONS.items():
        text = (root / path).read_text() if (root / path).exists() else ""
        found[root / path] = with_region(path, text, name, make(measured))
    return found


def with_region(path: str, page: str, name: str, text: str) -> str:
    """The page with `text` between the two markers. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{path}: expected {begin} and, after it, {end}, once each")
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def load() -> Measured:
    """The results files of all experiments that were measured."""
    paths = [experiment.results for experiment in ALL if experiment.results.exists()]
    return Measured({f"benchmarks/results/{path.name}": results_file.load(path) for path in paths})


def update(check: bool, measured: Measured | None = None, root: Path = ROOT) -> list[Path]:
    """Writes the pages that are out of date, unless only to check; returns their paths."""
    stale = []
    for path, text in render(measured or load(), root).items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return stale

"""Check README and pages: links, that every page can be reached, commands, and figures against the records.

python -m scripts.check_pages    # one line per fault; exit code 1 if there is one
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import main_cascade
import main_prune
import main_rl_prune
import main_sp
from benchmarks import architectures
from benchmarks.common import read_lines
from benchmarks.study import rows, seeds_table
from benchmarks.torchvision_models import table
from utils.errors import UserError
from utils.runs.results import cells
from utils.settings import settings_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# Scripts whose every flag is one of their settings.
FLAGS = {
    "main_sp.py": main_sp.Settings,
    "main_rl_prune.py": main_rl_prune.Settings,
    "main_cascade.py": main_cascade.Settings,
}
RESULTS = ROOT / "docs" / "results"
STUDY = [ROOT / "docs" / name for name in ("study.md", "measurements.md")]  # the pages with its tables
# The rows of README's results table: where the records of the study have them.
CIFAR_10, CIFAR_100 = RESULTS / "yardstick" / "study.json", RESULTS / "cifar100" / "study.json"
ROWS = {
    "ResNet-56 as others trained it": (CIFAR_10, "networks", "name", "resnet56"),
    "pruned to one half, seven epochs": (CIFAR_10, "networks", "name", "resnet56 at 50%"),
    "pruned to one quarter, 17 epochs": (CIFAR_10, "networks", "name", "resnet56 at 25%"),
    "cascade from four ResNets, a quarter": (CIFAR_10, "curve", "share", 0.25),
    "cascade from four ResNets, an eighth": (CIFAR_10, "curve", "share", 0.125),
    "ResNet-32, width 32, trained for 12 epochs": (CIFAR_100, "networks", "name", "resnet32"),
    "pruned to 21%, ten epochs": (CIFAR_100, "networks", "name", "resnet32 at 21%"),
    "cascade with a ResNet-20, 20%": (CIFAR_100, "curve", "share", 0.2),
}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """The links of a page into the repository: as written, the file, and the anchor or an empty string."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://", link):
            target, _, anchor = unquote(link).partition("#")
            yield link, ((page.parent / target).resolve() if target else page), anchor


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    return [
        link
        for link, file, anchor in links(page)
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file)))
    ]


def unreachable() -> list[Path]:
    """The pages that no chain of links leads to from README."""
    seen, waiting = {README}, [README]
    while waiting:
        found = {file for _, file, _ in links(waiting.pop()) if file in PAGES} - seen
        seen |= found
        waiting += found
    return [page for page in PAGES if page not in seen]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's bash blocks; a placeholder such as <run> is one of them."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)]
            if words:
                yield words


def refusal(program: str, *given: str) -> str | None:
    """Why a command of a page would not start, None where it would.

    Flags, keys and values of the stages are parsed; of other commands file and flags have to exist.
    """
    if program == "torchrun":
        program, given = "python", given[[word.startswith("--") for word in given].index(False) :]
    if program == "bash":
        return None if (ROOT / given[0]).is_file() else f"{given[0]} does not exist"
    if program == "pip":
        return None if given[:2] == ("install", "-r") and (ROOT / given[2]).is_file() else f"{given} installs nothing"
    if program != "python":
        return f"{program} is not a program of this repository"
    try:
        if given[0] in FLAGS:
            flags = [*given[1 : given.index("...")], "--data_dir", "data"] if "..." in given else given[1:]
            settings_parser(FLAGS[given[0]], "").parse_args(flags)
        elif given[0] == "main_prune.py":
            with mock.patch.object(sys, "argv", list(given)):
                main_prune.parse_arguments()
        elif given[0] == "-c":
            compile(given[1], "page", "exec")
        elif given[0] == "-m":
            return _unknown_flags(ROOT / f"{given[1].replace('.', '/')}.py", given)
        else:
            return f"{given[0]} is no script that this check knows"
    except (SyntaxError, UserError, SystemExit) as error:
        return str(error)
    return None


def _unknown_flags(module: Path, given: tuple[str, ...]) -> str | None:
    source = module.read_text() if module.exists() else ""
    missing = [flag for flag in re.findall(r"--\w+", " ".join(given)) if f'"{flag}"' not in source]
    return None if source and not missing else f"{module.name} does not exist or has no {', '.join(missing)}"


def figures() -> dict[str, tuple[str, ...]]:
    """The cells of each row of README's results table, from the records that are kept."""
    wanted = {}
    for label, (record, kind, key, value) in ROWS.items():
        found = json.loads(record.read_text())
        networks = {row["name"]: row for row in found["networks"]}
        row = next(row for row in found[kind] if row[key] == value)
        chosen = [[value]] if kind == "networks" else [one["members"] for one in row["chosen"]]
        whole = networks[found["reference"]]
        sizes = [sum(networks[name]["parameters"] for name in names) for names in chosen]
        wanted[label] = (
            f"{row['accuracy']:.2%}",
            f"{row['gflops']:.3f}",
            f"{whole['gflops'] / row['gflops']:.1f}x",
            f"{whole['milliseconds']['1'] / row['milliseconds']['1']:.1f}x",
            " or ".join(f"{count:,}" for count in dict.fromkeys(sizes)),
        )
    return wanted


def wrong_figures() -> list[str]:
    """The rows of README's results table that differ from the records."""
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.read_text().splitlines()]
    found = {cells[0]: tuple(cells[1:6]) for cells in shown if cells and cells[0] in ROWS}
    return [
        f"{method}: {found.get(method)} instead of {wanted}"
        for method, wanted in figures().items()
        if found.get(method) != wanted
    ]


def missing_rows() -> list[str]:
    """Rows of the records' tables that the pages of the study do not have as they are."""
    page = "".join(page.read_text() for page in STUDY)
    studies, chains = (
        [json.loads(path.read_text()) for path in sorted(RESULTS.rglob(name))] for name in ("study.json", "record.json")
    )
    kinds = ("networks", "curve", "one_family")
    wanted = [row for found in studies for kind in kinds for row in rows(found, kind)]
    wanted += [row for path in RESULTS.rglob("seeds.json") for row in seeds_table(json.loads(path.read_text()))[2:]]
    wanted += [f"| {' | '.join([record['method'], *cells(record)])} |" for record in chains]
    wanted += table(read_lines(RESULTS / "torchvision.jsonl"), share=0.7).splitlines()
    wanted += architectures.table(read_lines(RESULTS / "architectures.jsonl")).splitlines()
    return [row for row in wanted if row not in page]


def main() -> None:
    faults = [f"{page.name}: link {link}" for page in PAGES for link in broken_links(page)]
    faults += [f"{page.name}: no link leads here from README" for page in unreachable()]
    faults += [f"{page.name}: {shlex.join(c)}: {why}" for page in PAGES for c in commands(page) if (why := refusal(*c))]
    faults += [f"README.md: {row}" for row in wrong_figures()]
    faults += [f"study.md and measurements.md lack {row}" for row in missing_rows()]
    print("\n".join(faults) or "links, pages, commands and figures are in order")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

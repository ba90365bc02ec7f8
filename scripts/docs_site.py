"""Pages of the documentation that are made from files outside docs/ (an MkDocs hook, see mkdocs.yml).

README.md is the first page, CONTRIBUTING.md and CHANGELOG.md are two others; every document in benchmarks/results is
a page, with its picture, and a table of them all is made from the JSON beside them; every package of diffgap has a page
of its docstrings. Links between these files become links between pages; formulas become MathML, which browsers draw by
themselves.
"""

from __future__ import annotations

import html
import json
import logging
import posixpath
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")

#: Pages of files that lie outside of docs/, by their path in the repository.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/method.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]](</\2>)', re.DOTALL)
_FUNCTION = re.compile(r"<m([io])>([A-Za-z]{2,})</m\1>(?=((?:<mrow>)?<mo[^>]*>&#x00028;)?)")
_OVERLINE = re.compile(r'<mover>((?:(?!<mover>).)*?)<mo accent="true">&#x02015;</mo></mover>')
#: Operators that stand no farther from their neighbours than letters.
_CLOSE = re.compile(r'<mo(?: stretchy="false")?>(\||&#x000(?:7C|2F);|&#x02202;|&#x0221E;)</mo>')
#: A minus after a bracket, a comma or a relation is a sign.
_SIGN = re.compile(r"((?:\[|&#x000(?:28|2C|3D);)</mo>)<mo>&#x02212;</mo>")
_OVERVIEW = """# Benchmarks

The table has all timings in `benchmarks/results`, one line for each operation in a file. A peer's figure is its time
divided by diffgap's, from the least to the most over the cases of that operation: above 1 diffgap is faster. *Modelled*
times are computed for a named GPU and were not measured. `copy` is not a peer, nor are the parts of a call, which are
in the lines whose names end in `_parts`. [How it is measured](method.md) explains each name and has the rules. The
other pages of this section are the results themselves, those of retrieval included.

| operation | kind | cases | time of the peers in diffgap's | machine | date |
|---|---|--:|---|---|---|
"""
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the parts of the navigation whose pages are generated."""
    results = [
        {page.relative_to(RESULTS).with_suffix("").as_posix().removesuffix("/report"): _page_of(page)}
        for page in _documents()
    ]
    generated = {
        "Benchmarks": [{"Overview": "benchmarks/index.md"}, {"How it is measured": "benchmarks/method.md"}, *results],
        "API": [{name: f"api/{name}.md"} for name in _modules()],
    }
    for entry in config.nav or []:
        for title in generated.keys() & entry.keys():
            entry[title] = generated[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the pictures of the results."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for document in _documents():
        text = document_page(document)
        files.append(File.generated(config, _page_of(document), content=text))
    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        path = picture.relative_to(ROOT)
        files.append(File.generated(config, _page_of(path), abs_src_path=str(picture)))
    files.append(File.generated(config, "benchmarks/index.md", content=overview()))
    for name, modules in _modules().items():
        text = f"# {name}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files of the repository, as links between pages."""
    here = page.file.src_uri
    return _LINK.sub(lambda link: relink(link[1], here) + (link[2] or ""), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""
    return _FORMULA.sub(
        lambda formula: f"{formula[1]}{mathml(formula[3], display=formula[2] == 'div')}{formula[4]}", content
    )


def mathml(tex: str, *, display: bool) -> str:
    """A formula of LaTeX as MathML; one that cannot be read is a warning, which fails the build."""
    try:
        formula: str = convert(html.unescape(tex).strip(), display="block" if display else "inline")
    except Exception as error:
        _log.warning("formula %r: %s", tex, error)
        return f"<code>{tex}</code>"
    formula = _CLOSE.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', formula)
    formula = _SIGN.sub(r'\1<mo form="prefix" lspace="0" rspace="0">&#x02212;</mo>', formula)
    formula = _OVERLINE.sub(r'<mrow class="overline">\1</mrow>', formula)  # few fonts have a bar of any length
    return _FUNCTION.sub(_spaced, formula.replace(r"\_", "_"))  # which the converter leaves as it is in \text


def _spaced(function: re.Match[str]) -> str:
    """A function's name apart from its neighbours, as TeX sets ``\\ln u``, but not from a bracket that follows."""
    return f'<mo lspace="0.17em" rspace="{"0" if function[3] else "0.17em"}">{function[2]}</mo>'


def relink(target: str, page: str) -> str:
    """The link from ``page`` to the page or picture of a file, given by its path relative to the page's own source."""
    if page == "benchmarks/index.md" or page.startswith("api/"):
        return target  # made here, as links between pages
    in_results = page.startswith("benchmarks/")
    source = _SOURCES.get(page) or (f"{RESULTS}/{page.removeprefix('benchmarks/')}" if in_results else f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return posixpath.relpath(PAGES.get(path) or _page_of(Path(path)), posixpath.dirname(page) or ".")


def _page_of(path: Path) -> str:
    """Where a file of the repository is in the site."""
    text = path.as_posix()
    for folder, site in ((f"{RESULTS}/", "benchmarks/"), ("docs/", "")):
        if text.startswith(folder):
            return site + text.removeprefix(folder)
    return text


def _documents() -> list[Path]:
    """The documents of benchmarks/results, relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / RESULTS).rglob("*.md"))


def document_page(document: Path) -> str:
    """A document of benchmarks/results with the picture of the same name."""
    text = (ROOT / document).read_text(encoding="utf-8")
    picture = (ROOT / document).with_suffix(".png")
    if picture.exists() and picture.name not in text:
        text += f"\n![{document.stem}]({picture.name})\n"
    return _UNSEARCHED + text


def overview() -> str:
    """The table of all timings: per file and operation the cases, and each peer's time in diffgap's, least to most."""
    lines = [_OVERVIEW]
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        header, groups = result["header"], defaultdict(list)
        for row in result.get("rows", []):
            if "median_s" in row:
                groups[row["case"].partition("/")[0], row["kind"], row["device"]].append(row)
        for (operation, kind, device), rows in groups.items():
            where = f"{header['machine']['cpu']}, threads: {header['threads']}" if device == "cpu" else device
            cases = len({row["case"] for row in rows})
            cells = f"[{operation}]({path.stem}.md) | {kind} | {cases} | {_ratios(rows)} | {where} | {header['date']}"
            lines.append(f"| {cells} |\n")
    return "".join(lines)


def _ratios(rows: list[dict[str, Any]]) -> str:
    ours = {row["case"]: row["median_s"] for row in rows if row["impl"] == "diffgap"}
    peers: dict[str, list[float]] = {}
    for row in rows:
        if row["impl"] != "diffgap" and row["case"] in ours:
            peers.setdefault(row["impl"], []).append(row["median_s"] / ours[row["case"]])
    return ", ".join(f"{name} {_span(min(ratios), max(ratios))}" for name, ratios in peers.items())


def _span(least: float, most: float) -> str:
    first, last = f"{least:.3g}", f"{most:.3g}"
    return first if first == last else f"{first} to {last}"


def _modules() -> dict[str, list[str]]:
    """The public modules of diffgap, by the package or module below diffgap that they belong to."""
    pages: dict[str, list[str]] = {}
    for path in sorted((ROOT / "diffgap").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if len(names) > 1 and not any(name.startswith("_") for name in names):
            pages.setdefault(names[1], []).append(".".join(names))
    return pages

"""What the documentation site makes out of files of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="pip install 'diffgap[docs]'")
pytest.importorskip("latex2mathml", reason="pip install 'diffgap[docs]'")
pytest.importorskip("griffe", reason="pip install 'diffgap[docs]'")

from scripts import docs_site
from scripts.docs_docstrings import to_markdown


@pytest.mark.parametrize(
    ("page", "target", "expected"),
    [
        ("index.md", "docs/media.md", "media.md"),
        ("index.md", "benchmarks/results/a.png", "benchmarks/a.png"),
        ("speed.md", "../benchmarks/results/b/c.png", "benchmarks/b/c.png"),
        ("tutorials/bridge.md", "../bridge.md", "../bridge.md"),
        ("tutorials/bridge.md", "../../README.md", "../index.md"),
        ("contributing.md", "docs/speed.md", "speed.md"),
        ("benchmarks/run/report.md", "gap.png", "gap.png"),
        ("benchmarks/index.md", "method.md", "method.md"),
    ],
)
def test_links_between_files_become_links_between_pages(page: str, target: str, expected: str) -> None:
    assert docs_site.relink(target, page) == expected


def test_the_overview_has_the_ratios_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {("op/a", "diffgap"): 1.0, ("op/a", "peer"): 2.0, ("op/b", "diffgap"): 4.0, ("op/b", "peer"): 6.0}
    rows = [
        {"case": case, "impl": impl, "median_s": time, "kind": "measured", "device": "cpu"}
        for (case, impl), time in times.items()
    ]
    header = {"date": "2026-01-31", "machine": {"cpu": "A chip"}, "threads": 1}
    monkeypatch.setattr(docs_site, "ROOT", tmp_path)
    folder = tmp_path / docs_site.RESULTS
    folder.mkdir(parents=True)
    (folder / "chip.json").write_text(json.dumps({"header": header, "rows": rows}))
    line = "| [op](chip.md) | measured | 2 | peer 1.5 to 2 | A chip, threads: 1 | 2026-01-31 |"
    assert docs_site.overview().splitlines()[-1] == line


def test_every_public_module_has_a_page() -> None:
    pages = docs_site._modules()
    assert "diffgap.ops.clip_loss" in pages["ops"]
    assert "diffgap.losses" in pages["losses"]
    assert not [module for modules in pages.values() for module in modules if "._" in module]


def test_formulas_become_mathml(caplog: pytest.LogCaptureFixture) -> None:
    assert "<mfrac>" in docs_site.on_page_content(r'<div class="arithmatex">\[\frac{1}{N}\]</div>')
    assert docs_site.on_page_content(r'<span class="arithmatex">\(a &lt; b\)</span>').count("<mi>") == 2
    assert not caplog.records
    docs_site.mathml(r"\frac{1}{", display=False)
    assert caplog.records[0].levelname == "WARNING"


def test_names_with_underscores_have_no_backslash() -> None:
    assert "<mtext>logit_scale</mtext>" in docs_site.mathml(r"\text{logit\_scale}", display=False)


def test_names_of_functions_stand_apart() -> None:
    def rspace(tex: str) -> str:
        return docs_site.mathml(tex, display=False).partition('rspace="')[2].partition('"')[0]

    assert rspace(r"2 \ln u") == rspace(r"\operatorname{lse}_i x") == "0.17em"
    assert rspace(r"\ln(u)") == rspace(r"\log \left( u \right)") == "0"


def test_operators_stand_where_tex_puts_them() -> None:
    formula = docs_site.mathml(r"\overline{\hat u} / \overline{|w|}", display=True)
    assert formula.count('<mrow class="overline">') == 2 and formula.count("<mover") == 1
    assert formula.count('lspace="0" rspace="0"') == 3
    for tex, signs in ((r"f(-h) = -g", 2), (r"[-1, -2]", 2), (r"a - b", 0)):
        assert docs_site.mathml(tex, display=False).count('form="prefix"') == signs


def test_docstrings_become_markdown() -> None:
    text = "Cost of :func:`~a.b` in :math:`O(n)`:\n\n.. math::\n    a = b,\n    c\n\nAs scores[x][y], [x][y] -> z.\n"
    expected = "Cost of `a.b` in $O(n)$:\n\n$$\na = b, c\n$$\n\nAs scores[x][y], `[x][y]` -> z."
    assert to_markdown(text) == expected


def test_parameters_that_share_a_description_get_it_each() -> None:
    text = "Args:\n    a, b: Both,\n        and more.\n    x, y: Neither is one.\n"
    assert to_markdown(text, {"a", "b"}) == (
        "Args:\n    a: Both,\n        and more.\n    b: Both,\n        and more.\n    x, y: Neither is one."
    )

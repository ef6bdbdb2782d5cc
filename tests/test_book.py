"""The book: it is complete, every link in it leads somewhere, and what is broken fails its build.

    python docs/build.py --out site && TINYLM_BOOK=site python -m pytest -m book

Without TINYLM_BOOK the tests build a book of their own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tinylm import ops
from tinylm.coursework.lessons import lessons

ROOT = Path(__file__).parent.parent
LESSONS = lessons(ROOT / "lessons")
EACH = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
pytestmark = pytest.mark.book


def build(root, *options):
    command = [sys.executable, "docs/build.py", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the book."""
    if "TINYLM_BOOK" in os.environ:
        return Path(os.environ["TINYLM_BOOK"])
    folder = tmp_path_factory.mktemp("book") / "site"
    done = build(ROOT, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def prose(lesson):
    """The text of a lesson and of its solutions."""
    solutions = ROOT / "lessons" / "solutions" / lesson.path.name
    source = "".join(path.read_text(encoding="utf-8") for path in (lesson.path, solutions))
    return "\n".join(re.findall(r'^r"""\n(.*?)^"""$', source, re.M | re.S))


class Page(HTMLParser):
    """The addresses, anchors and visible text of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors, self.words = path, [], [], set(), []
        self.article, self.inside = [], False
        self.silent = 0  # inside a script, code or a formula
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        if tag == "a":
            self.links.append(attributes.get("href"))
            self.article += self.links[-1:] * self.inside  # without the menus
        elif tag not in ("use", "svg", "html", "form"):
            self.loaded += [attributes[name] for name in ("src", "href", "data") if attributes.get(name)]
        self.inside |= tag == "article"
        self.silent += tag in ("script", "style", "pre", "code")

    def handle_endtag(self, tag):
        self.inside &= tag != "article"
        self.silent -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data):
        if not self.silent:
            self.words.append(data)


@pytest.fixture(scope="session")
def pages(site):
    """{path: Page}"""
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_leads_somewhere(site, pages):
    count = 0
    for path, page in pages.items():
        for link in filter(None, [*page.links, *page.loaded]):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            assert there.is_file(), f"{path}: {link}"
            if parts.fragment and there.suffix == ".html":
                anchors = next(other.anchors for at, other in pages.items() if at.resolve() == there)
                assert unquote(parts.fragment) in anchors, f"{path}: {link}"
            count += 1
    assert count > 5000


def test_nothing_is_loaded_from_the_network(site, pages):
    for path, page in pages.items():
        for link in page.loaded:
            assert not urlsplit(link).netloc, f"{path}: {link}"
    assert (site / "_static" / "STIXTwoMath.woff").is_file()  # which book.css loads
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", path.read_text(encoding="utf-8")), path


def test_no_markup_is_left_over(pages):
    for path, page in pages.items():
        assert not re.findall(r"\$[^$]{0,80}\$|:\w+:`|(?<!`)`[^`\n]+`|\\(?:frac|mathrm|hat|sum)\b", page.text), path


@EACH
def test_a_lesson_has_its_outputs_figures_solutions_and_files(lesson, site, pages):
    page = pages[site / "lessons" / f"{lesson.path.stem}.html"]
    html = page.path.read_text(encoding="utf-8")
    source = lesson.path.read_text(encoding="utf-8")
    figures = re.findall(r"\]\(figures/(.+?)\)", source)
    images = [Path(link).name for link in page.loaded if "_images" in link]
    assert images == figures  # each once
    questions = re.findall(r'^check\("(.+?)"', source, re.M)
    for name in questions:
        assert f"{name}: not done yet" in html
    assert re.findall(r"<details.*?><summary>Solution of (.+?)</summary>", html) == questions
    solutions = (ROOT / "lessons" / "solutions" / lesson.path.name).read_text(encoding="utf-8")
    assert html.count("</details>") >= len(questions) == len(re.findall(r"^check\(", solutions, re.M))
    assert "at 0x" not in page.text
    downloads = {Path(link).name: page.path.parent / link for link in page.links if link and "_downloads" in link}
    assert set(downloads) == {lesson.path.name, f"{lesson.path.stem}.ipynb"}
    assert downloads[lesson.path.name].read_bytes() == lesson.path.read_bytes()
    notebook = json.loads(downloads[f"{lesson.path.stem}.ipynb"].read_text(encoding="utf-8"))
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds.count("markdown") == source.count("# %% [markdown]")
    assert not [
        cell for cell in notebook["cells"] if cell["cell_type"] == "markdown" and '"""' in "".join(cell["source"])
    ]
    carried = [name for cell in notebook["cells"] for name in cell.get("attachments", {})]
    assert carried == figures
    formulas = re.findall(r"\$\$.*?\$\$|\$.*?\$", re.sub(r"`[^`]*`", "", prose(lesson)), re.S)
    assert html.count("<math") >= len(formulas) > 0


def test_every_lesson_is_on_the_landing_page(site, pages):
    links = pages[site / "index.html"].article
    for lesson in LESSONS:
        assert f"lessons/{lesson.path.stem}.html" in links


def test_every_op_has_an_entry_and_its_source(site, pages):
    page = pages[site / "reference" / "ops.html"]
    for name in {name for name, value in vars(ops).items() if callable(value) and not name.startswith("_")}:
        assert f"tinylm.ops.{name}" in page.anchors
        module = getattr(ops, name).__module__.replace(".", "/")
        assert f"../_modules/{module}.html#{name}" in page.links


def test_names_in_lessons_are_links(site, pages):
    links = pages[site / "lessons" / "05_layer_norm.html"].article
    assert "../_modules/tinylm/ops/layer_norm.html" in links  # `tinylm/ops/layer_norm.py`
    assert "00_finite_differences.html" in links  # lesson 00
    for lesson in LESSONS:
        for number in re.findall(r"[Ll]esson\s+(\d\d)", prose(lesson)):
            there = [f"{other.path.stem}.html" for other in LESSONS if other.number == number != lesson.number]
            assert set(there) <= set(pages[site / "lessons" / f"{lesson.path.stem}.html"].article), (
                lesson.path,
                number,
            )
    assert "../reference/ops.html#tinylm.ops.layer_norm" in links  # ops.layer_norm(t, w, b) in the code
    assert "../reference/ops.html#tinylm.ops.matmul.column_sums" in links  # `column_sums`


def test_the_search_knows_words_and_names(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index[index.index("{") : index.rindex("}") + 1])
    lesson = index["docnames"].index("lessons/05_layer_norm")
    for word in ("layer", "norm"):
        pages = index["titleterms"][word]  # a number, or several
        assert lesson in (pages if isinstance(pages, list) else [pages])
    assert any(name[4] == "layer_norm" for name in index["objects"]["tinylm.ops"])


# --- what must fail ---------------------------------------------------------------------------------------------------

PROSE = """
# %% [markdown]
r\"\"\"
{}
\"\"\"
"""
# {what a lesson says: what the build says of it}
BROKEN = {
    "[nowhere](99_nowhere.py)": "99_nowhere.py",
    "[nowhere](#no-such-heading)": "no-such-heading",
    "`tinylm/ops/nowhere.py`": "there is no file tinylm/ops/nowhere.py",
    "`ops.nowhere`": "there is no ops.nowhere in tinylm",
    "`tinylm.nn.Nowhere(3)`": "there is no tinylm.nn.Nowhere(3) in tinylm",
    r"$\nowhere{x}$": r"the formula \nowhere{x}: 0: Unknown command",
    "![nowhere](figures/nowhere.png)": "image file not readable: lessons/figures/nowhere.png",
}
# {the docstring of a function: what the build says of it}
UNRENDERED = {
    "zeros": ("See `ops.elsewhere`.", "there is no ops.elsewhere in tinylm"),
    "ones": ("An `open end.", "docstring of tinylm.creation.ones:1: WARNING: Inline interpreted text"),
    "randn": ("One:\n\n    - first\n  - second", "docstring of tinylm.creation.randn:4: WARNING"),
}


@pytest.fixture
def clone(tmp_path):
    """What the book is made of, with one lesson."""
    unwanted = shutil.ignore_patterns(
        "__pycache__", "figures", "predictions.json", *(f"{i:02}_*.py" for i in range(3, 99))
    )
    for name in ("tinylm", "docs", "lessons"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for path in tmp_path.glob("lessons/**/0[01]_*.py"):
        path.unlink()
    readme = tmp_path / "lessons" / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines()
    readme.write_text("\n".join(line for line in lines if not re.match(r"\| \[(?!02)", line)), encoding="utf-8")
    return tmp_path


def test_what_is_broken_fails_the_build_and_is_named(clone):
    lesson = clone / "lessons" / "02_softmax_cross_entropy.py"
    with lesson.open("a", encoding="utf-8") as file:
        file.write("".join(PROSE.format(text) for text in BROKEN))
    page = clone / "tinylm" / "creation.py"
    code = page.read_text(encoding="utf-8")
    for name, (text, _) in UNRENDERED.items():
        code = re.sub(rf'(def {name}\(.*\n    """)[^"]*', lambda match, text=text: match[1] + text, code)
    page.write_text(code, encoding="utf-8")
    done = build(clone, "--out", "site")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for said in [*BROKEN.values(), *(said for _, said in UNRENDERED.values())]:
        assert len([line for line in lines if said in line and "WARNING" in line]) == 1, f"{said}\n{done.stderr}"
    assert len([line for line in lines if "WARNING" in line]) == len(BROKEN) + len(UNRENDERED), done.stderr
    assert lines[-1].startswith("the book is not complete")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(1)\n1 / 0", "02_softmax_cross_entropy.py: ZeroDivisionError: division by zero, in the cell"),
        ("import sys\nsys.stderr.write('hm')", "02_softmax_cross_entropy.py writes to stderr: hm"),
        ("np.float64(1) / 0", "02_softmax_cross_entropy.py writes to stderr: .*RuntimeWarning: divide by zero"),
    ],
)
def test_a_lesson_that_raises_or_warns_is_named(clone, code, said):
    lesson = clone / "lessons" / "02_softmax_cross_entropy.py"
    with lesson.open("a", encoding="utf-8") as file:
        file.write(f"\n# %%\n{code}\n")
    done = build(clone, "--out", "site")
    assert done.returncode == 1
    assert re.match(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (clone / "site").exists()


def test_wrong_options_get_one_line(clone):
    (clone / "full").mkdir()
    (clone / "full" / "mine.txt").touch()
    for options, said in ((["--out", "full"], "holds no book"), (["--out", "site", "--only", "77"], "no lesson 77")):
        done = build(clone, *options)
        assert done.returncode == 2
        assert said in done.stderr
    assert (clone / "full" / "mine.txt").exists()


# --- the field guide --------------------------------------------------------------------------------------------------


def test_the_field_guide_says_of_each_bug_what_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import field_guide

    from tinylm.coursework import bugs

    text = field_guide.chapter(tmp_path)
    logs = json.loads((ROOT / "lessons" / "recorded" / "14_clinic.json").read_text())["runs"]
    entries = re.split(r"^\(bug-\d\d\)=\n", text, flags=re.M)
    assert len(entries) == len(bugs.BUGS) + 1
    pictures = set()
    for number, (name, entry) in enumerate(zip(bugs.BUGS, entries[1:], strict=True), 1):
        bug = bugs.BUGS[name]
        assert f"| [{name}](#bug-{number:02}) | {logs[name]['fresh'][-1]:.2f} |" in entries[0]
        assert entry.startswith(f"## {number}. {name[0].upper()}{name[1:]}\n")
        assert bug.tells in entry
        ((right, wrong),) = bugs.changes(bug)
        assert re.search(re.escape(wrong) + r".*In the place of.*" + re.escape(right), entry, re.S)
        assert f"FOUND {bug.probe} " in entry
        assert f"{name}: " in entry.partition("FOUND")[2]
        pictures.add((tmp_path / "field_guide" / f"bug-{number:02}.png").read_bytes())
    assert len(pictures) == len(bugs.BUGS)  # each has curves of its own

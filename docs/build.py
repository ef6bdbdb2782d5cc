"""Build the book: run the lessons as notebooks, and publish them with a reference as a static site.

    pip install -e ".[docs]"
    python docs/build.py --out site
    python docs/build.py --out site --only 05     # runs lesson 05 alone; the others stand as they last ran

A lesson that raises or warns, a broken link, a wrong formula or a docstring that does not render ends it with status 1.
"""

import argparse
import base64
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import field_guide
import jupytext
import nbformat
import reference
from fontTools import subset
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
WORK = ROOT / "build" / "book"  # what Sphinx reads; the notebooks stay here for --only
# Chapters behind the lessons: {the name of a page: a function that is given the folder of the pages, where it may save
# pictures, and returns its Markdown, which begins with a title}.
CHAPTERS: dict[str, Callable[[Path], str]] = {"field_guide": field_guide.chapter}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the site; an earlier one is replaced")
    parser.add_argument("--only", nargs="+", metavar="NN", help="run these lessons alone; a whole build comes first")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "searchindex.js").exists():
        parser.error(f"{args.out} is not empty, and holds no book")
    clock = time.perf_counter()
    sources = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
    chosen = [path for path in sources if args.only is None or path.name[:2] in args.only]
    if not chosen:
        parser.error(f"there is no lesson {' or '.join(args.only or ['at all'])}")
    if args.only is None:
        shutil.rmtree(WORK, ignore_errors=True)
    faults = execute(chosen)
    if faults:
        sys.exit("\n".join(faults))
    missing = [path.name for path in sources if not notebook(path).exists()]
    if missing:
        parser.error(f"{missing[0]} has not run yet: build the whole book once, without --only")
    print(f"{len(chosen)} lessons ran in {time.perf_counter() - clock:.0f} seconds")
    write_pages(sources)
    if sphinx(["-q", "-E", "-W", "--keep-going", "-c", str(DOCS), str(WORK / "pages"), str(WORK / "html")]):
        sys.exit("the book is not complete: see above (line 240002 of a notebook is line 2 of its cell 24)")
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(WORK / "html", args.out, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    print(f"the book is in {args.out}, after {time.perf_counter() - clock:.0f} seconds")


# --- run --------------------------------------------------------------------------------------------------------------


def notebook(lesson: Path) -> Path:
    """Where the executed notebook of a lesson is."""
    return WORK / "executed" / f"{lesson.stem}.ipynb"


def execute(lessons: list[Path]) -> list[str]:
    """Run lessons as notebooks, two at a time: each computes on one thread. Returns one line for each that fails."""
    folder = WORK / "executed"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "lessons" / "recorded", folder / "recorded", dirs_exist_ok=True)
    for lesson in lessons:
        notebook(lesson).unlink(missing_ok=True)
    os.environ["MPLBACKEND"] = "agg"  # figures are shown where the text has them, not also where they are made
    with ThreadPoolExecutor(2) as pool:
        return [fault for fault in pool.map(run, lessons) if fault]


def run(lesson: Path) -> str | None:
    """Run a lesson in a kernel of its own, and keep the notebook. Returns what went wrong."""
    book = jupytext.read(lesson)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = NotebookClient(
        book,
        kernel_name="python3",
        timeout=300,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(WORK / "executed")}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{lesson.name}: {error.ename}: {error.evalue}, in the cell\n{where(book)}"
    except CellTimeoutError:
        return f"{lesson.name}: a cell takes more than 300 seconds"
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                return f"{lesson.name} writes to stderr: {output.text.strip()}"
    nbformat.write(book, notebook(lesson))
    return None


def where(book: nbformat.NotebookNode) -> str:
    """The cell that raised."""
    for cell in book.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            return cell.source
    return ""


# --- pages ------------------------------------------------------------------------------------------------------------


def write_pages(sources: list[Path]) -> None:
    """Write what Sphinx reads: the landing page, the lessons, the chapters, the reference."""
    pages = WORK / "pages"
    for folder in (pages, WORK / "html"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("lessons", "downloads", "reference", "static"):
        (pages / name).mkdir(parents=True)
    shutil.copytree(WORK / "executed" / "figures", pages / "lessons" / "figures")
    shutil.copy(DOCS / "book.css", pages / "static")
    font(pages / "static" / "STIXTwoMath.woff")
    for path in sources:
        write_lesson(path, pages)
    for name in reference.PAGES:
        (pages / "reference" / f"{name}.rst").write_text(reference.page(name), encoding="utf-8")
    for name, chapter in CHAPTERS.items():
        (pages / f"{name}.md").write_text(chapter(pages), encoding="utf-8")
    lessons = [f"lessons/{path.stem}" for path in sources]
    entries = [f"reference/{name}" for name in reference.PAGES]
    contents = [toctree("Lessons", lessons), toctree("Beside them", list(CHAPTERS)), toctree("Reference", entries)]
    (pages / "index.md").write_text("\n".join([landing(), *contents]), encoding="utf-8")


def toctree(caption: str, names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", ":titlesonly:", f":caption: {caption}", "", *names, "```", ""])


def landing() -> str:
    """docs/index.md, and the table of the lessons from their README, in which a lesson is a page."""
    readme = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"\((\d\d_\w+)\.py\)", r"(lessons/\1.ipynb)", readme)
    readme = readme.replace("[`solutions/`](solutions)", "`solutions/`, and at the end of each page")
    readme = readme.replace("[README](../README.md)", "README")
    readme = readme.replace("| | lesson |", "{.lessons}\n| | lesson |")  # a name for book.css
    return (DOCS / "index.md").read_text(encoding="utf-8") + re.sub(r"^#", "##", readme, flags=re.M)


def write_lesson(lesson: Path, pages: Path) -> None:
    """The page of a lesson: the executed notebook, what can be downloaded, and the solutions, folded."""
    book = nbformat.read(notebook(lesson), as_version=4)
    for cell in book.cells:
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "code":  # the address of an object and the name of a picture tell a reader nothing
            for o in cell.outputs:
                if o.get("name") == "stdout":
                    o.text = re.sub(r"^picture: .*\n", "", o.text, flags=re.M)
            cell.outputs = [
                o
                for o in cell.outputs
                if not re.fullmatch("<.* at 0x.*>", o.get("data", {}).get("text/plain", "")) and o.get("text") != ""
            ]
    shutil.copy(lesson, pages / "downloads")
    nbformat.write(with_pictures(book), pages / "downloads" / f"{lesson.stem}.ipynb")
    files = ", ".join(
        f"{{download}}`{lesson.stem}{end} <../downloads/{lesson.stem}{end}>`" for end in (".py", ".ipynb")
    )
    book.cells[0].source += f"\n\nDownload: {files}"
    book.cells += [new_markdown_cell("## Solutions"), *solutions(lesson)]
    nbformat.write(book, pages / "lessons" / f"{lesson.stem}.ipynb")


def with_pictures(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of a notebook that carries its figures."""
    book = nbformat.from_dict(book)
    for cell in book.cells:
        for path in re.findall(r"\((figures/.+?)\)", cell.source) if cell.cell_type == "markdown" else []:
            name = Path(path).name
            if not (WORK / "executed" / path).exists():
                continue  # Sphinx will say so
            kind = "image/svg+xml" if path.endswith(".svg") else "image/png"
            data = base64.b64encode((WORK / "executed" / path).read_bytes()).decode()
            cell.setdefault("attachments", {})[name] = {kind: data}
            cell.source = cell.source.replace(f"({path})", f"(attachment:{name})")
    return book


def solutions(lesson: Path) -> list[nbformat.NotebookNode]:
    """The cells of a lesson's solutions: what stands below the title, the imports, and each exercise, folded."""
    title, *cells = jupytext.read(ROOT / "lessons" / "solutions" / lesson.name).cells
    folded, opened = [], False

    def fold(summary: str) -> None:
        nonlocal opened
        close, opened = "</details>\n\n" * opened, True
        folded.append(new_markdown_cell(f'{close}<details class="solution"><summary>{summary}</summary>'))

    if text := title.source.partition("\n")[2].strip():
        fold("Answers to the lesson")
        folded.append(new_markdown_cell(text))
    for cell in cells:
        if match := re.match(r"\*\*(\d\d\.\d)\*\*\s*", cell.source):
            fold(f"Solution of {match[1]}")
            cell.source = cell.source[match.end() :]
        folded.append(cell)
    return [*folded, new_markdown_cell("</details>")]


def font(path: Path) -> None:
    """STIX Two Math (licence: OFL), as far as formulas need it: a telephone has no font for mathematics."""
    ziamath = find_spec("ziamath")
    assert ziamath is not None
    assert ziamath.origin is not None
    ranges = "20-7E,A0-FF,302-307,370-3FF,2010-2064,2100-22FF,2308-230B,27E8-27E9,1D434-1D467,1D6A4-1D6E1"
    whole = Path(ziamath.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    subset.main([str(whole), f"--unicodes={ranges}", "--flavor=woff", f"--output-file={path}"])


if __name__ == "__main__":
    main()

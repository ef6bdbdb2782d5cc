"""Sphinx's settings for the book. `docs/build.py` calls Sphinx, on the folder that it has prepared."""

import sys
from pathlib import Path

import tinylm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

project = "tinylm"
html_title = f"tinylm {tinylm.__version__}"
smartquotes = False  # a docstring has dictionaries in it
exclude_patterns = ["downloads", "static"]

extensions = [
    "myst_nb",  # the executed notebooks, and every other page
    "sphinx.ext.autodoc",  # the docstrings
    "sphinx.ext.viewcode",  # the source, as pages
    "sphinx_codeautolink",  # names in code are links to the reference
    "sphinx_copybutton",
    "mathematics",
    "links",
]
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # build.py did it
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
highlight_language = "default"  # of docstrings: Python where it is Python
nitpicky = True
# Types of other packages, and letters that stand for types, have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!tinylm\.).*|tinylm\.(errors\.Function|cli\.Config|parallel\.Result)")]
codeautolink_concat_default = True  # a cell knows the imports of the cells before it

html_theme = "furo"
pygments_dark_style = "monokai"  # furo's own underlines imports, as if they were links
html_static_path = [str(Path(__file__).parent.parent / "build" / "book" / "pages" / "static")]
html_css_files = ["book.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
copybutton_selector = "div.cell_input pre, div.highlight-sh pre, div.highlight-python pre"

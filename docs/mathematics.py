"""Formulas as MathML, made when the book is built: browsers draw it themselves, without a script and a network."""

import re

from docutils.nodes import SkipNode
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

LATEX = LatexToMathML(macros={"cr": r"\\"}, fancy_error=False)


def mathml(translator, node, displaystyle):
    latex = node.astext()
    try:
        formula = LATEX.convert_with_local_state(latex, displaystyle=displaystyle)
    except LatexError as error:
        logging.getLogger(__name__).warning("the formula %s: %s", latex, error, location=node)
        return translator.encode(latex)
    # The font's prime is raised already: as a superscript it would be raised twice, and tiny.
    prime = r'<mrow>\1<mo lspace="0.05em" rspace="0">\2</mo></mrow>'
    formula = re.sub(r"<msup>(<mi>[^<]*</mi>)<mo>([′″‴])</mo></msup>", prime, formula)
    # Without this a root reserves room for the tallest sign that the font has.
    return re.sub(
        r"<msqrt>(<mi>\w</mi>|<mrow>.*?</mrow>)</msqrt>",
        r'<msqrt><mpadded height="0.75em">\1</mpadded></msqrt>',
        formula,
    )


def inline(translator, node):
    formula = mathml(translator, node, False)
    # One that may be wider than a telephone is scrolled by itself.
    translator.body.append(f'<span class="math">{formula}</span>' if len(node.astext()) > 50 else formula)
    raise SkipNode


def display(translator, node):
    translator.body.append(f'<div class="math">{mathml(translator, node, True)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}

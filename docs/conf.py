"""Sphinx: ``make docs``. Its source is the repository: links between README.md and docs/ are checked."""

import re

project = "NeuMuter Kernels"
author = "the authors of NeuMuter Kernels"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

html_theme = "furo"
html_show_copyright = False
html_title = project
html_extra_path = ["index.html"]  # leads to root_doc
html_copy_source = False

myst_heading_anchors = 3  # as GitHub makes them
suppress_warnings = ["myst.header"]  # a page may begin with a table of a generated part

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more: dtypes and shapes
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!neumuter).*")]  # torch and transformers are documented elsewhere

linkcheck_anchors = False


def _formulas(app, what, name, obj, options, lines):
    """Bars and unpacking stars in docstrings are no markup."""
    lines[:] = [re.sub(r"\||\*(?=\w+\))", r"\\\g<0>", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _formulas)

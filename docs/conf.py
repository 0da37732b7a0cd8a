"""The documentation site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from lowrank_dist import __version__

project = "lowrank_dist"
author = copyright = "The lowrank_dist authors"  # Sphinx's name for it
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["_build", "_extensions"]
templates_path: list[str] = []
html_static_path = ["_static"]

# single backticks are names: linked where the site has them, plain code elsewhere
default_role = "py:obj"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

myst_enable_extensions = ["attrs_inline"]
# links to headings of any page are checked, as links to pages are
myst_heading_anchors = 3
suppress_warnings: list[str] = []

html_theme = "pydata_sphinx_theme"
html_title = f"lowrank_dist {__version__}"
html_sidebars = {"index": [], "quickstart": []}
html_show_sourcelink = False
html_copy_source = False
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"text": "lowrank_dist"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""Configuration of the documentation: https://www.sphinx-doc.org/page/usage/configuration.html"""

import os
import shutil
import tomllib
from datetime import datetime
from pathlib import Path

from sphinx.application import Sphinx
from sphinxcontrib import katex

HERE = Path(__file__).parent
ROOT = HERE.parent

# -- Project -----------------------------------------------------------------

# read from the file, because the metadata of an editable installation may be stale
info = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project = info["name"]
author = info["authors"][0]["name"]
copyright = f"{datetime.now():%Y}, {author}"
version = release = info["version"]
repository_url = info["urls"]["Source"]

# -- Extensions --------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
    "sphinx_autodoc_typehints",
    "sphinx_design",
    "IPython.sphinxext.ipython_console_highlighting",
    "sphinxext.opengraph",
]

templates_path = ["_templates"]
# .rst comes first, because autosummary writes its pages with the first suffix
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store", "**.ipynb_checkpoints"]
default_role = "literal"
pygments_style = "default"

autosummary_generate = True
autodoc_member_order = "groupwise"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_param = True
napoleon_use_rtype = True  # the type of what is returned gets a line of its own
typehints_defaults = "braces"
always_use_bars_union = True  # `X | None` in every Python

bibtex_bibfiles = ["references.bib"]
katex_prerender = shutil.which(katex.NODEJS_BINARY) is not None

myst_heading_anchors = 6
myst_url_schemes = ("http", "https", "mailto")
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "html_admonition", "html_image"]

nb_execution_mode = "off"  # notebooks are shown as they were run and committed
nb_merge_streams = True
nb_output_stderr = "remove"

# -- References to other packages --------------------------------------------

# Links into other documentations need a network: without it, their inventories cannot be read and -W ends the build.
intersphinx_mapping = (
    {
        "anndata": ("https://anndata.scverse.org/en/stable/", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable/", None),
        "mudata": ("https://mudata.scverse.org/en/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.scverse.org/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
    if os.environ.get("DOCS_INTERSPHINX") == "1"
    else {}
)

# A name that nothing documents is an error, except where it belongs to another package: then it is plain text, since
# intersphinx may be off, and scvi-tools and mudata annotate with names of private modules that no inventory has.
nitpicky = True
third_party = (
    *("anndata", "annbatch", "lightning", "mudata", "numpy", "pandas", "scanpy", "scipy", "scvi", "sklearn", "sparse"),
    *("torch", "tqdm", "xarray"),
    # the standard library
    *("abc", "collections", "os", "pathlib", "types", "typing"),
)
# types of this package that annotate public methods, but are not part of the public interface
internal = ("_typing", "module", r"data\._loader", r"data\._streaming")
nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(third_party)})(\..*)?"),
    (r"py:.*", rf"cellplm_scvi\.({'|'.join(internal)})(\..*)?"),
]

# -- HTML --------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["css/custom.css"]
html_theme_options = {
    "repository_url": repository_url,
    "use_repository_button": True,
    "path_to_docs": "docs/",
    "navigation_with_keys": False,
}


def copy_tutorials(app: Sphinx, _config: object) -> None:
    """Copy the notebooks of `tutorials/` beside the pages, since Sphinx reads no file outside of its source folder."""
    target = Path(app.srcdir) / "tutorials"
    notebooks = {path.name: path for path in (ROOT / "tutorials").glob("*.ipynb")}
    for stale in target.glob("*.ipynb"):
        if stale.name not in notebooks:
            stale.unlink()
    for name, path in notebooks.items():
        # with its time, so that Sphinx reads again only what changed
        shutil.copy2(path, target / name)


def setup(app: Sphinx) -> None:
    """Connect what runs before Sphinx looks for pages."""
    app.connect("config-inited", copy_tutorials)

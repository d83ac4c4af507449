"""The documentation as a site: ``sphinx-build -W docs build/docs``. Nothing that it shows comes from a network."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

project = "flash_mla for Hopper"
project_copyright = "the flash_mla authors"
release = metadata.version("flash-mla")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_static"]
highlight_language = "none"
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings give shapes and types
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"flash_mla {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

# Files of the repository that are pages of the site, by the page that shows them.
PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "include/flash_mla/dense_decode.h": "cpp_api",
    "src/sm90/dense_decode/README.md": "kernels/schedule_64_rows",
    "src/sm90/dense_decode_narrow/README.md": "kernels/schedule_narrow",
}
REPOSITORY = Path(__file__).resolve().parent.parent


class RepositoryLinks(SphinxTransform):
    """Links to files of the repository lead to the pages that show them; those to other files become plain text."""

    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        for link in list(self.document.findall(lambda node: "reftarget" in getattr(node, "attributes", ()))):
            path = self._outside(link)
            if path is None:
                continue
            page = PAGES.get(path)
            if page is None:
                link.replace_self(link.children)
                continue
            options = {"refdomain": "std", "reftype": "doc", "refexplicit": True, "refwarn": True}
            link.replace_self(
                addnodes.pending_xref("", *link.children, reftarget=f"/{page}", refdoc=self.env.docname, **options)
            )

    def _outside(self, link: nodes.Element) -> str | None:
        """The file of the repository, beside docs/, that a link names. MyST makes downloads of files, but Markdown."""
        if isinstance(link, addnodes.download_reference):
            path = Path(self.env.doc2path(self.env.docname)).parent / link["reftarget"]
        elif link.get("refdomain") == "doc" and Path(link["reftarget"]).is_absolute():
            path = Path(link["reftarget"] + ".md")
        else:
            return None
        return str(path.resolve().relative_to(REPOSITORY))


class PlainTables(SphinxTransform):
    """Columns as wide as their text needs: without this, docutils fixes their widths by the source's."""

    default_priority = 6

    def apply(self, **kwargs: object) -> None:
        for table in self.document.findall(nodes.table):
            table["classes"] = [*(name for name in table["classes"] if name != "colwidths-given"), "colwidths-auto"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_transform(RepositoryLinks)
    app.add_transform(PlainTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Links from names of the library in a guide to their pages in the reference."""

from __future__ import annotations

import importlib
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

PACKAGES = ("weightdecay", "spectrum", "balance", "optim", "descent")
NAME = re.compile(r"(?:(?:mf|mirrorflow)\.)?([A-Za-z_][\w.]*)(?:\(.*\))?", re.S)
# Pages in which a name may be a folder's, or whose names the reference writes itself.
EXEMPT = ("architecture", "reference/", "api")


def targets() -> dict[str, str]:
    """Return the page of each name, by the name as guides write it."""
    import mirrorflow

    found = {name: f"mirrorflow.{name}" for name in mirrorflow.__all__}
    for package in PACKAGES:
        for name in importlib.import_module(f"mirrorflow.{package}").__all__:
            found[f"{package}.{name}"] = found.get(name, f"mirrorflow.{package}.{name}")
            if name[0].isupper():  # a small one may be a word: table, fold
                found.setdefault(name, f"mirrorflow.{package}.{name}")
    return found


class LinkNames(SphinxTransform):
    """Link the first mention of a name in each section."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        """Replace literals by references around them."""
        if self.env.docname.startswith(EXEMPT):
            return
        known, seen = targets(), set()
        for literal in list(self.document.findall(nodes.literal)):
            match = NAME.fullmatch(literal.astext())
            name = match and (match[1] if match[1] in known else match[1].split(".")[0])
            if name not in known or _inside(literal, nodes.title, nodes.reference, pending_xref):
                continue
            place = (id(_section(literal)), name)
            if place not in seen:
                seen.add(place)
                literal.replace_self(self._reference(known[name], literal))

    def _reference(self, target: str, literal: nodes.literal) -> pending_xref:
        """Return a reference that shows the literal as it is written."""
        shown = nodes.literal(literal.rawsource, literal.astext(), classes=["xref", "py"])
        return pending_xref(
            "", shown, refdoc=self.env.docname, refdomain="py", reftype="obj", reftarget=target,
            refexplicit=True, refwarn=True,
        )  # fmt: skip


def _inside(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    """Return whether a node stands in one of these kinds."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def _section(node: nodes.Node) -> nodes.Node:
    """Return the section that a node stands in."""
    while node.parent is not None and not isinstance(node, nodes.section):
        node = node.parent
    return node


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform."""
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

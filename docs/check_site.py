"""Fails where a page of the built site would fetch something from a network: ``check_site.py build/docs``.

Links that a reader may follow are fine; scripts, styles, fonts and pictures must come with the site.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

_REMOTE = re.compile(r"^\s*(https?:)?//")
_REMOTE_IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""")


class _Fetches(HTMLParser):
    """Collects what a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        fetched = [given.get("src", ""), given.get("srcset", ""), given.get("data", "") if tag == "object" else ""]
        if tag == "link" and given.get("rel") not in ("canonical", "alternate"):
            fetched.append(given.get("href", ""))
        self.remote += [address for address in fetched if _REMOTE.match(address)]
        self.remote += _REMOTE_IN_CSS.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.remote += _REMOTE_IN_CSS.findall(data)


def remote_fetches(site: Path) -> list[str]:
    """``file: address`` of each thing that a page, or a style sheet, takes from elsewhere."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = _Fetches()
        parser.feed(page.read_text())
        found += [f"{page.relative_to(site)}: {address}" for address in parser.remote]
    for sheet in sorted(site.rglob("*.css")):
        found += [f"{sheet.relative_to(site)}: {address}" for address in _REMOTE_IN_CSS.findall(sheet.read_text())]
    return found


def main() -> int:
    """The exit code: 1 where something is fetched, or there is no page."""
    site = Path(sys.argv[1])
    num_pages = len(list(site.rglob("*.html")))
    found = remote_fetches(site)
    print("\n".join(found) or f"{num_pages} pages, nothing fetched from elsewhere")
    return 1 if found or num_pages == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

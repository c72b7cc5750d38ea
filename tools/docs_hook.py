"""Fit the pages for `mkdocs build`: links to files outside docs/ become the files' names, and one that leads nowhere is an error.

mkdocs.yml names this file under `hooks`. On a site there is nothing outside docs/; in a checkout,
where the pages are read as well, the links work.
"""

import pathlib
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return a page with its links out of docs/ as text.

    Raises:
        FileNotFoundError: a link leads to no file.
    """
    docs = pathlib.Path(config["docs_dir"])

    def as_text(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = (docs / page.file.src_uri).parent / target
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: a link to {target}, which is not there")
        name = path.resolve().relative_to(docs.parent.resolve())
        return f"`{name}`" if text.strip("`/") in str(name) else f"{text} (`{name}`)"

    return _LINK.sub(as_text, markdown)

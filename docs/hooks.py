"""Pages link to files of the repository as they see them, `../examples/tutorial.py`: on the site, those of its host."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return _OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", markdown)

"""HTML pages: the report of a run, the scores of evaluations, the audit of media, the demo.

All but the demo are one file that opens offline, rendered from `templates/`. Names, captions and messages come from
files of others: templates escape every value, and the policy of a page forbids the network and all scripts but its own.
"""

import functools
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("mmaudio_hf.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: Any) -> Markup:
    """HTML of a template; `Markup`, so other templates take it as it is."""
    return Markup(_environment().get_template(template).render(**values))


def write_page(path: str | os.PathLike, template: str, **values: Any) -> Path:
    """Render a template that extends `base.html.jinja` into `path`, which is replaced as a whole; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # File names on Linux are bytes: what is not UTF-8 arrives as surrogates, which no page can hold.
        partial.write_text(render(template, **values), encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path

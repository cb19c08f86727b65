"""Hooks of the documentation site: pages that live outside docs/, and the table of config keys.

Links in the Markdown files are relative to the repository, so that they also work on a code host. Here they become
links of the site.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # path in the repository -> page of the site
    "ARCHITECTURE.md": "architecture.md",
    "checkpoints/README.md": "model-folder.md",
    "checkpoints/emoji/README.md": "shipped-model.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")
MARKER = "<!-- config keys -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Point the entries of the navigation at the pages of the site."""
    config.nav = _renamed(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            text = (ROOT / source).read_text()
            files.append(File.generated(config, page, content=_with_site_links(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the config keys, and turn links of the repository into links of the site."""
    if MARKER in markdown:
        markdown = markdown.replace(MARKER, _config_keys())
    if page.file.generated_by:
        return markdown
    return _with_site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep a number and its percent sign on one line."""
    return re.sub(r"(\d) %", r"\1&nbsp;%", html)


def _renamed(nav):
    if isinstance(nav, list):
        return [_renamed(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: _renamed(entry) for title, entry in nav.items()}
    return PAGES.get(nav.removeprefix("../"), nav)


def _with_site_links(text: str, source: str, page: str) -> str:
    """The Markdown of `source`, a path in the repository, with links as the page `page` of the site needs them."""

    def replace(match: re.Match) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return match[0]
        return match[1] + posixpath.relpath(path, posixpath.dirname(page) or ".") + match[3]

    return LINK.sub(replace, text)


def _config_keys() -> str:
    """The keys of every training command as Markdown: a heading for each group, a table with key, default, comment."""
    sys.path.insert(0, str(ROOT))
    from stipple.commands.config_keys import CONFIGS, command_keys

    return "\n\n".join(_command_page(command, command_keys(command)) for command in CONFIGS)


def _command_page(command: str, keys: list) -> str:
    """The keys of one command, by the first part of their names; single keys come first."""
    groups: dict[str, list] = {"": []}
    prefixes = {row.key.partition(".")[0] for row in keys if "." in row.key}
    for row in keys:
        first, _, rest = row.key.partition(".")
        groups.setdefault(first if first in prefixes else "", []).append(row)
    parts = [f"## `stipple {command}`"]
    for name, rows in groups.items():
        if name:
            about = rows[0] if rows[0].key == name else None
            parts.append(f"### {command}: {name}")
            if about is not None:
                absent = " Absent by default." if about.default == "null" else ""
                parts.append(_sentence(about.comment) + absent)
                rows = rows[1:]
        parts.append('<div class="config-keys" markdown>\n\n' + _table(rows) + "\n\n</div>")
    return "\n\n".join(parts)


def _table(rows: list) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        kind, default = (f"`{text}`" if text else "" for text in (_choices(row.type), row.default))
        lines.append(f"| `{row.key}` | {kind} | {default} | {_cell(row.comment)} |")
    return "\n".join(lines)


def _choices(annotation: str) -> str:
    """A type as people write it: the values of a Literal, `null` for None."""
    values = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | ").replace('"', ""), annotation)
    return values.replace("'", "").replace("None", "null")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].removesuffix(".") + "." if text else ""

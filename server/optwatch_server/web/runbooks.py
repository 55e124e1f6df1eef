"""Runbooks at the deployed version, as pages: the Markdown files of the shipped folder, and nothing beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_FIRST_STEPS = "mitigation"


@dataclass(frozen=True, slots=True)
class Runbook:
    """One runbook, rendered. `first_steps` is its section Mitigation, or empty where it has none."""

    name: str
    html: str
    first_steps: str


def names(folder: Path) -> list[str]:
    """Return the names of all runbooks, sorted."""
    return sorted(path.stem for path in folder.glob("*.md") if _NAME.fullmatch(path.stem))


def load(folder: Path, name: str) -> Runbook | None:
    """Return the runbook called `name`, or None where there is none: a name never leads out of the folder."""
    if not _NAME.fullmatch(name) or not (path := folder / f"{name}.md").is_file():
        return None
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(path.read_text(encoding="utf-8"))
    for token in tokens:
        for child in token.children or ():
            _link_to_page(child)
    render = markdown.renderer.render
    return Runbook(
        name,
        str(render(tokens, markdown.options, {})),
        str(render(_section(tokens, _FIRST_STEPS), markdown.options, {})),
    )


def _link_to_page(token: Token) -> None:
    """Turn ``TrainingNonFinite.md``, which works in a clone, into the address of its page here."""
    if token.type != "link_open":
        return
    target = re.fullmatch(r"(?:\./)?([A-Za-z0-9_-]+)\.md(#.*)?", str(token.attrs.get("href", "")))
    if target:
        token.attrs["href"] = f"/runbooks/{target[1]}{target[2] or ''}"


def _section(tokens: Sequence[Token], title: str) -> list[Token]:
    """Return what stands under the heading `title`, up to the next heading of its level or above."""
    begin = level = None
    for index, token in enumerate(tokens):
        if token.type != "heading_open":
            continue
        if begin is not None and level is not None and token.tag <= level:
            return list(tokens[begin:index])
        if begin is None and tokens[index + 1].content.strip().lower() == title:
            begin, level = index + 3, token.tag
    return [] if begin is None else list(tokens[begin:])

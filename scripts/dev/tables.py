"""Tables that scripts write into pages, between two marks."""

from __future__ import annotations

from pathlib import Path


def replaced(page: str, begin: str, end: str, lines: list[str]) -> str:
    """`page` with `lines` in place of what stands between the lines `begin` and `end`.

    Raises:
        SystemExit: If `page` lacks one of them.
    """
    before, has_begin, rest = page.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise SystemExit(f"the page has no lines {begin} and {end}; put them where the table belongs")
    return before + "\n".join([begin, *lines, end]) + after


def print_or_write(page: Path, begin: str, end: str, lines: list[str], write: bool) -> None:
    """Print `lines`, or put them into `page` as `replaced` does."""
    if write:
        page.write_text(replaced(page.read_text(encoding="utf-8"), begin, end, lines), encoding="utf-8")
    else:
        print("\n".join(lines))

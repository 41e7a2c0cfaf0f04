"""Check what is about to be released, and take its notes from the changelog. Needs nothing but the standard library.

python scripts/dev/release.py check v0.2.0          the tag is this version, and the changelog has a section for it
python scripts/dev/release.py check v0.2.0 dist     and the sdist and the wheel in dist hold what they should
python scripts/dev/release.py notes v0.2.0          that section, for the release on GitHub
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from vllm_bailing import __version__  # noqa: E402 (imports the standard library alone)

CHANGELOG = ROOT / "CHANGELOG.md"
NAME = "vllm_bailing"
# What an sdist needs for `scripts/test.sh` to work in it.
SDIST_FOLDERS = ("deploy", "docs", "requirements", "scripts", "tests", NAME)


def notes(tag: str, changelog: str) -> str:
    """The section of `changelog` for `tag`, without its heading; empty if there is none."""
    sections = re.split(r"^## v?(\S+).*$", changelog, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    return found.get(tag.removeprefix("v"), "").strip()


def problems_of(tag: str, dist: Path | None, version: str = __version__) -> list[str]:
    """What is wrong with releasing `version` as `tag`, from the files in `dist` if it is given."""
    problems = []
    if tag != f"v{version}":
        problems.append(f"the tag is {tag}, and vllm_bailing.__version__ is {version}: v{version} would be its tag")
    if not notes(tag, CHANGELOG.read_text(encoding="utf-8")):
        problems.append(f"CHANGELOG.md has no section ## {tag.removeprefix('v')}, or an empty one")
    if dist is not None:
        problems += problems_of_files(dist, version)
    return problems


def problems_of_files(dist: Path, version: str) -> list[str]:
    """What is wrong with the sdist and the wheel in `dist`."""
    sdist, wheel = dist / f"{NAME}-{version}.tar.gz", dist / f"{NAME}-{version}-py3-none-any.whl"
    there = {file.name for file in dist.iterdir()}
    if there != {sdist.name, wheel.name}:
        return [f"{dist} holds {', '.join(sorted(there))}; it should hold {sdist.name} and {wheel.name}"]
    info = f"{NAME}-{version}.dist-info"
    sources = files_of(ROOT / NAME)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    package = {name for name in inside if not name.startswith(f"{info}/")}
    problems = difference(wheel.name, package, sources)
    if f"\nVersion: {version}\n" not in metadata:
        problems.append(f"{wheel.name}: its metadata names another version")
    if "bailing = vllm_bailing:register" not in entry_points:
        problems.append(f"{wheel.name}: vLLM would not find the plugin, for lack of its entry point")
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = set().union(*(files_of(ROOT / folder) for folder in SDIST_FOLDERS))
    return problems + difference(sdist.name, {name for name in inside if name.split("/")[0] in SDIST_FOLDERS}, wanted)


def files_of(folder: Path) -> set[str]:
    """Paths below the root of all files in `folder`, except compiled ones."""
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(ROOT).as_posix() for file in files}


def difference(archive: str, inside: set[str], wanted: set[str]) -> list[str]:
    problems = []
    for text, names in (("lacks", wanted - inside), ("should not hold", inside - wanted)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{archive} {text} {', '.join(sorted(names)[:3])}{more}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="exit code 1 and what is wrong, or nothing")
    check.add_argument("tag")
    check.add_argument("dist", nargs="?", type=Path, help="folder with the sdist and the wheel")
    commands.add_parser("notes", help="print the changelog's section").add_argument("tag")
    options = parser.parse_args(arguments)
    if options.command == "notes":
        print(notes(options.tag, CHANGELOG.read_text(encoding="utf-8")))
        return 0
    problems = problems_of(options.tag, options.dist)
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

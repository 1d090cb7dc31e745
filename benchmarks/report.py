"""Draws all figures and regenerates the tables of README and docs from the committed results.

    python benchmarks/report.py                # docs/figures/*.svg, and the tables
    python benchmarks/report.py --tables       # the tables alone: needs no matplotlib
    python benchmarks/report.py --check        # changes nothing; fails where a table is out of date

Tables stand between `<!-- table: NAME -->` and `<!-- end of table -->`; the names are those of
`tables.TABLES`. Everything outside of these marks is left as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from committed import Results
from tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of table -->"
BLOCK = re.compile(rf"<!-- table: ([\w-]+) -->\n(.*?){END}", re.DOTALL)


def updated(text: str, results: Results) -> str:
    """Returns a document with its tables made anew.

    Raises:
        ValueError: If a table is unknown or a mark has no end.
    """

    def block(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table {name!r} is unknown, expected one of {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name](results)}\n{END}"

    if text.count("<!-- table: ") != len(BLOCK.findall(text)):
        raise ValueError(f"a table has no {END}")
    return BLOCK.sub(block, text)


def documents(root: Path) -> list[Path]:
    """Returns the files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    """Updates everything, or says what is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="no figures")
    parser.add_argument("--check", action="store_true", help="changes nothing")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--kind", choices=("svg", "png"), default="svg", help="of figures")
    options = parser.parse_args()
    results, old = Results(ROOT / "benchmarks" / "results"), []
    for path in documents(ROOT):
        text = path.read_text()
        if (new := updated(text, results)) == text:
            continue
        old.append(path.relative_to(ROOT))
        if not options.check:
            path.write_text(new)
    if options.check:
        for name in old:
            print(f"{name}: out of date; python benchmarks/report.py --tables", file=sys.stderr)
        return 1 if old else 0
    for name in old:
        print(name)
    if not options.tables:
        try:
            from plots import draw
        except ImportError as error:
            sys.exit(f'{error}: figures need pip install "meddanet[plots]"; --tables does not')
        for picture in draw(results, options.figures, options.kind):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

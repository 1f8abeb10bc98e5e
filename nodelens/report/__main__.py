"""``python -m nodelens.report outputs/** [--to folder]``: one page over many runs."""

import argparse
import sys

from .runs_page import compare


def main(arguments: list[str] | None = None) -> int:
    """Writes the page and prints its path; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nodelens.report", description="Writes one page over many runs.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or patterns such as 'outputs/**'")
    parser.add_argument("--to", default="comparison", help="folder for index.html and its figures (default: comparison)")
    parser.add_argument(
        "--plotly", default="shared", help="the script that draws: shared (a file), inline or cdn (default: shared)"
    )
    given = parser.parse_args(arguments)
    try:
        print(f"page: {compare(given.runs, given.to, given.plotly)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

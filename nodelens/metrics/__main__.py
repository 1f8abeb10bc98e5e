"""``python -m nodelens.metrics`` prints the catalogue; ``python -m nodelens.metrics rq`` prints the entry of one metric."""

import sys

from .catalogue import catalogue, entry_of


def main(names: list[str]) -> None:
    """Prints the entries of the given names, or all entries. An unknown name prints one line and exits with code 1."""
    try:
        print("\n".join(map(entry_of, names)) if names else catalogue(), end="")
    except ValueError as error:
        sys.exit(f"nodelens: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

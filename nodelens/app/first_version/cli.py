"""``python -m nodelens.cli``, now ``python -m nodelens.app``: for one version the old name works too, with a warning."""

import sys

from nodelens.app.cli import script

if __name__ == "__main__":
    print("warning: python -m nodelens.cli is now nodelens, or python -m nodelens.app", file=sys.stderr)
    script()

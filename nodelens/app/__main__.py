"""``python -m nodelens.app analyze ...``: the console script ``nodelens``, if it is not on the path."""

from .cli import script

script()

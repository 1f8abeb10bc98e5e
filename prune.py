"""python prune.py [key=value ...]; --help shows the groups and their options."""

from nodelens.app.cli import prune

if __name__ == "__main__":
    prune()

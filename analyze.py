"""python analyze.py [key=value ...]; --help shows the groups and their options."""

from nodelens.app.cli import analyze

if __name__ == "__main__":
    analyze()

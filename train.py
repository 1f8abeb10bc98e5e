"""python train.py [key=value ...]; --help shows the groups and their options."""

from nodelens.app.cli import train

if __name__ == "__main__":
    train()

"""Train as a recipe says: `accelerate launch [--config_file HARDWARE] train.py RECIPE [key=value ...] [--dry-run]`."""

import sys

from mmaudio_hf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())

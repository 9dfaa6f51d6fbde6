"""The same as `mmaudio-hf pull`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pull", *sys.argv[1:]]))

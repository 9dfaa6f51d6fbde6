"""The same as `mmaudio-hf evaluate`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""The same as `mmaudio-hf partition`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["partition", *sys.argv[1:]]))

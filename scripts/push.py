"""The same as `mmaudio-hf push`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))

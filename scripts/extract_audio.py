"""The same as `mmaudio-hf extract-audio`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract-audio", *sys.argv[1:]]))

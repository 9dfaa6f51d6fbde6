"""The same as `mmaudio-hf example-media`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["example-media", *sys.argv[1:]]))

"""The same as `mmaudio-hf generate`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))

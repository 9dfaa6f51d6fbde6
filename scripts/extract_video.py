"""The same as `mmaudio-hf extract-video`."""

import sys

from mmaudio_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract-video", *sys.argv[1:]]))

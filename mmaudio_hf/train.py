"""`python -m mmaudio_hf.train`: train.py for an installed package, `accelerate launch -m mmaudio_hf.train RECIPE`."""

import sys

from mmaudio_hf.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())

"""`python -m mmaudio_hf.cli`."""

import sys

from mmaudio_hf.cli import main

sys.exit(main())

"""``python -m sonic_ep``: the command line."""

import sys

from sonic_ep.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The layer end to end: verified, profiled, timed. ``sonic-ep bench`` under the name that torchrun starts.

torchrun --nproc_per_node=8 --standalone bench/moe_ep.py --thiek 131072,4096,1536,128,8
"""

import sys

from sonic_ep.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

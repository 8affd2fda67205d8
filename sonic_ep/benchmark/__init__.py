"""What this layer costs, measured: verified first, then timed in turn with what it is held against.

``sonic-ep bench`` and ``bench/moe_ep.py`` run it end to end, the pytest suites of ``bench/`` piece by piece.
"""

"""Timeout of tests that only guard against a hang, in seconds: far above any run time."""

HANG_SECONDS = 600.0

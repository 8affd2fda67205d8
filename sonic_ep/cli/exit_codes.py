"""Exit codes of the commands."""

PASS, FAIL, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130

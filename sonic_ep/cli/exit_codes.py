"""What a command's exit code means."""

GREEN, RED, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130

"""The one limit of whatever only guards against a hang, in seconds: generous, since a busy machine is no fault."""

HANG_SECONDS = 600.0

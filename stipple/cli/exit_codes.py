"""Exit codes of the command line."""

USAGE_ERROR = 2  # a mistake of the user
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT

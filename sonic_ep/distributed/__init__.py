"""What the ranks of a group tell each other on the host, in bounded time."""

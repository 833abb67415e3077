"""One file a tool: the workloads of `peers.py` in that tool's own documented words. Each runs in a process (and environment) of its own."""

"""What the command line runs on a run of traces: every analysis by name, resumable, with saved results."""

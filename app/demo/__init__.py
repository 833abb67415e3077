"""The demo: the run it makes, its summary and its report."""

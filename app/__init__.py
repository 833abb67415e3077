"""What people touch: the command line, the report and the browser app. Wires the rest and computes nothing itself."""

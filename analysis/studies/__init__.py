"""Studies: a plan in YAML from problems to a report, run step by step, resumed, and estimated before it begins."""

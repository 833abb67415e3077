"""What the probes predict: length of the thinking, how much of it is left, refusal, and correctness."""

"""What the probes predict: length of the thinking, how much of it is left, refusal, correctness, and any label of a user's own."""

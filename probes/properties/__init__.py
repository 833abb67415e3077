"""What a probe predicts: thinking length, tokens remaining, refusal and correctness."""

"""What happens at single tokens: MI peaks, entropy, confidence, alternatives and forced answers."""

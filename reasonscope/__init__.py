"""Look inside reasoning models: capture, probe, steer and analyse what they think before they answer."""

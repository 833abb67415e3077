"""Making traces: decoding, rollouts, capture and recording, in one process or by a cluster."""

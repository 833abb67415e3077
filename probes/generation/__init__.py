"""Making traces: decoding, rollouts, capture and recording, in one process, by a server or by a cluster."""

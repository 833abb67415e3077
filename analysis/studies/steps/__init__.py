"""The kinds of steps of a study: record, probe, steer, analyse."""

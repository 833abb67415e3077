"""Compares answers as mathematics, in a process with limits of time and memory."""

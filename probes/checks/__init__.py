"""Proofs that the numbers are right: the checks of `reasonscope verify` and the table of supported families."""

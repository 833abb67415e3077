"""The pages of the browser app: each shows one aspect of a run and computes nothing."""

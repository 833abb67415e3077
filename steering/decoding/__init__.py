"""Interventions on decoding itself: logit processors, budget guidance and prefilled text."""

"""How text is cut and read: regions, steps, sentences, labels, answers, and their alignment with tokens."""

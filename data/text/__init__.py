"""Reading text: regions, steps, sentences, labels and answers, and their alignment with tokens."""

"""What each analysis tells its reader: the finding in a sentence, a small table with nulls, and the text that matters."""

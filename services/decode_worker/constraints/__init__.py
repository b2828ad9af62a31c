"""What the output of a request must be: grammars, and each sequence's place in its own."""

"""Workers: which there are, which one gets a request, and the connection to it."""

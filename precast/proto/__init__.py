"""Generated code and nothing else: change protos/ and run `make protos`."""

"""Generated code: change protos/ and run `make protos`."""

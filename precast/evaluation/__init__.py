"""What quantisation costs a model."""

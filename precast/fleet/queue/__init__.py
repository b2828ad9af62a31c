"""The queue of captures: single-flight jobs in a Redis stream."""

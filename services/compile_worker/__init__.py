"""The compile worker: captures graphs, verifies, signs, stores and hands them out."""

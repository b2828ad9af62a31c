"""The store kept in bounds and in order."""

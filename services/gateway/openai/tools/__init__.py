"""Tools: what a request may offer the model, and how models write their calls."""

"""New versions of a graph: recompile, try, promote."""

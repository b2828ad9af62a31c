"""Makes graphs: export, code generation, build, verification. Nothing that serves imports this."""

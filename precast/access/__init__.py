"""Who may use the services."""

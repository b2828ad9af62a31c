"""The captured sizes follow the traffic."""

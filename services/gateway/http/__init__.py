"""Connections and bodies, before anything knows of OpenAI."""

"""``python -m precast`` is the ``precast`` command."""

from precast.cli.main import app

app()

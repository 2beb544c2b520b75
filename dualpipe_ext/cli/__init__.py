"""The ``dualpipe`` command: one file per subcommand, put together in ``main.py``."""
